-- payout_split(): every unit is given away, in proportion.
\ir fresh.psql
BEGIN;
SELECT plan(45);

-- ---------------------------------------------------------------------------
-- By hand
-- ---------------------------------------------------------------------------

SELECT is(payout_split(pool, weights::bigint[]), shares::bigint[], what)
  FROM (VALUES
    (100, '{1,1}',           '{50,50}',          'halves'),
    (100, '{1,1,1}',         '{34,33,33}',       'what is left goes to the first of equals'),
    (101, '{1,1,1}',         '{34,34,33}',       'or the first two'),
    (100, '{2,1}',           '{67,33}',          'the larger remainder gets it: 66.67 and 33.33'),
    (10,  '{1,2,3}',         '{2,3,5}',          '1.67, 3.33 and 5'),
    (100, '{1,2,1,2}',       '{17,33,17,33}',    '16.67 gets it before 33.33'),
    (1,   '{1,2}',           '{0,1}',            '0.33 and 0.67'),
    (1,   '{1,1,1}',         '{1,0,0}',          'one unit goes to one'),
    (3,   '{1,3}',           '{1,2}',            '0.75 gets it before 2.25'),
    (1,   '{1,3}',           '{0,1}',            'a larger weight'),
    (2,   '{1,3}',           '{0,2}',            'a tie of remainders goes to the larger weight'),
    (2,   '{3,1}',           '{2,0}',            'wherever it stands'),
    (0,   '{1,2}',           '{0,0}',            'nothing to divide'),
    (100, '{0,5,0}',         '{0,100,0}',        'a weight of 0 gets nothing'),
    (7,   '{0,0,0,1,1}',     '{0,0,0,4,3}',      'not even what is left'),
    (42,  '{1}',             '{42}',             'one gets all'),
    (5,   '{1000000,1}',     '{5,0}',            'a tiny weight may get nothing')
  ) AS t (pool, weights, shares, what);

-- ---------------------------------------------------------------------------
-- The limits of bigint
-- ---------------------------------------------------------------------------

SELECT is(payout_split(9223372036854775807, '{9223372036854775807}'), '{9223372036854775807}', 'the largest pool and weight');
SELECT is(payout_split(9223372036854775807, '{9223372036854775807,9223372036854775807}'),
    '{4611686018427387904,4611686018427387903}', 'weights whose sum is beyond bigint');
SELECT is(payout_split(9223372036854775807, array_fill(9223372036854775807, ARRAY[1000]))::numeric[],
    (SELECT array_agg(CASE WHEN i <= 807 THEN 9223372036854776 ELSE 9223372036854775 END ORDER BY i)::numeric[] FROM generate_series(1, 1000) i),
    'a thousand of them');
SELECT is(payout_split(9223372036854775807, '{9223372036854775807,1}'), '{9223372036854775806,1}',
    'remainders are exact where floating point would not be');
SELECT is(payout_split(9223372036854775807, '{1,9223372036854775806}'), '{1,9223372036854775806}', 'a pool as large as the weights');
SELECT is((SELECT sum(s) FROM unnest(payout_split(1000003, array_fill(7::bigint, ARRAY[100000]))) s), 1000003::numeric,
    'a hundred thousand shares');

-- a million weights; the products stay within bigint, so that SQL is fast at it
CREATE TEMP TABLE million AS
SELECT n, weight, share, 1000000000039 * weight / sum AS floor, 1000000000039 * weight % sum AS remainder
  FROM (SELECT array_agg(1 + n * 7919 % 100003 ORDER BY n) AS weights, sum(1 + n * 7919 % 100003)::bigint AS sum FROM generate_series(1, 1000000::bigint) n) w
 CROSS JOIN LATERAL ROWS FROM (unnest(weights), unnest(payout_split(1000000000039, weights))) WITH ORDINALITY AS s (weight, share, n);
SELECT is((SELECT sum(share) FROM million), 1000000000039::numeric, 'a million shares add up to the pool');
SELECT is_empty(
    $$SELECT * FROM (SELECT *, floor + (row_number() OVER (ORDER BY remainder DESC, weight DESC, n)
                                        <= 1000000000039 - sum(floor) OVER ())::int AS expected FROM million) m
       WHERE share <> expected$$, 'and each of them is right');

-- ---------------------------------------------------------------------------
-- What must hold for any input, on more than a hundred thousand random ones
-- ---------------------------------------------------------------------------

SELECT setseed(0.42) \g /dev/null
CREATE TEMP TABLE trial AS
SELECT n, pool, weights
  FROM (SELECT n, CASE n % 4 WHEN 0 THEN (random() * 10)::bigint
                             WHEN 1 THEN (random() * 1e4)::bigint
                             WHEN 2 THEN (random() * 1e12)::bigint
                             ELSE least(random() * 1e19, 9.2e18)::bigint + 23372036854775807 END AS pool,
               (1 + random() * 8)::int AS count
          FROM generate_series(1, 120000) n OFFSET 0) AS c
 CROSS JOIN LATERAL (SELECT array_agg(CASE WHEN random() < 0.1 THEN 0
                                           WHEN c.n % 3 = 0 THEN (random() * 5)::bigint
                                           WHEN c.n % 3 = 1 THEN (random() * 1e6)::bigint
                                           ELSE least(random() * 1e19, 9.2e18)::bigint + 23372036854775807 END ORDER BY i) AS weights
                       FROM generate_series(1, c.count) i) w
 WHERE 0 < ANY (weights);
CREATE TEMP TABLE share AS
SELECT n, pool, i, weight::numeric, share, sum(weight) OVER (PARTITION BY n)::numeric AS total
  FROM trial CROSS JOIN LATERAL ROWS FROM (unnest(weights), unnest(payout_split(pool, weights)))
       WITH ORDINALITY AS s (weight, share, i);

ANALYZE trial, share;
SELECT cmp_ok((SELECT count(*) FROM trial), '>', 100000::bigint, 'there are more than a hundred thousand trials');
SELECT cmp_ok((SELECT count(*) FROM trial WHERE pool = 9223372036854775807 AND 9223372036854775807 = ANY (weights)), '>', 100::bigint,
    'some of them with a pool and a weight at the limit of bigint');
SELECT is_empty('SELECT n, pool, sum(share) FROM share GROUP BY n, pool HAVING sum(share) <> pool', 'the shares add up to the pool');
SELECT is_empty('SELECT * FROM share WHERE share IS NULL OR share NOT BETWEEN div(pool * weight, total) AND div(pool * weight, total) + 1',
    'a share is its exact value, rounded down or up');
SELECT is_empty('SELECT * FROM share WHERE weight = 0 AND share <> 0', 'no weight, no share');
SELECT is_empty('SELECT * FROM share a JOIN share b USING (n) WHERE a.weight > b.weight AND a.share < b.share',
    'a larger weight never gets less');
SELECT is_empty('SELECT * FROM share a JOIN share b USING (n) WHERE a.weight = b.weight AND abs(a.share - b.share) > 1',
    'equal weights get the same, but for one unit');
SELECT is_empty(
    $$SELECT * FROM (SELECT *, div(pool * weight, total)
                            + (row_number() OVER (PARTITION BY n ORDER BY mod(pool * weight, total) DESC, weight DESC, i)
                               <= pool - sum(div(pool * weight, total)) OVER (PARTITION BY n))::int AS expected
                       FROM share) s
       WHERE share <> expected$$, 'it is the method of the largest remainder');
SELECT is_empty(
    $$WITH turned AS (SELECT n, pool, array_agg(w ORDER BY random()) AS weights
                        FROM trial, unnest(weights) w GROUP BY n, pool)
      (SELECT n, w, s FROM trial, LATERAL ROWS FROM (unnest(weights), unnest(payout_split(pool, weights))) AS t (w, s)
        EXCEPT ALL
       SELECT n, w, s FROM turned, LATERAL ROWS FROM (unnest(weights), unnest(payout_split(pool, weights))) AS t (w, s))$$,
    'the order of the weights does not matter');

-- ---------------------------------------------------------------------------
-- Errors
-- ---------------------------------------------------------------------------

SELECT throws_ok(format('SELECT payout_split(%s, %L::bigint[])', pool, weights), code, NULL, what)
  FROM (VALUES
    (-1, '{1}',       '23514', 'a negative pool'),
    (1,  '{}',        '22023', 'no weights'),
    (1,  '{1,NULL}',  '22023', 'a weight that is null'),
    (1,  '{1,-1}',    '22023', 'a weight that is negative'),
    (1,  '{0,0}',     '22023', 'weights that are all 0'),
    (0,  '{0}',       '22023', 'nothing to divide among nobody'),
    (1,  '{{1,2}}',   '22023', 'two dimensions')
  ) AS t (pool, weights, code, what);
SELECT throws_like('SELECT payout_split(1, ''{1,2,-3}'')', '%weights[3]%', 'a bad weight is named by its position');
SELECT is(payout_split(NULL, '{1}'), NULL, 'pool null');
SELECT is(payout_split(1, NULL), NULL, 'weights null');
SELECT is(payout_split(3, '[5:6]={1,2}'::bigint[]), '{1,2}', 'an array may begin at any index');

SELECT finish();
ROLLBACK;
