-- Challenges of made-up users, who have been paid before.

-- So many people stake one unit each, one half of them on each side.
CREATE PROCEDURE bench.stake(challenge_id bigint, stakes bigint)
LANGUAGE plpgsql AS $$
BEGIN
    FOR lowest IN 0 .. stakes - 1 BY 10000 LOOP
        PERFORM payout_place_stake(challenge_id, bench.user_id(i), CASE i % 2 WHEN 0 THEN 'YES' ELSE 'NO' END, 1)
           FROM generate_series(lowest, least(lowest + 9999, stakes - 1)) i;
        COMMIT;
    END LOOP;
END $$;

-- Challenges of two stakes each, no user in two of them.
CREATE PROCEDURE bench.challenges(challenges bigint, due_at timestamptz)
LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. challenges LOOP
        CALL bench.two_stakes(payout_create_challenge('challenge', due_at, 'creator', 'challenger', 'challenged'), 2 * i);
    END LOOP;
END $$;
CREATE PROCEDURE bench.two_stakes(challenge_id bigint, user_number bigint)
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM payout_place_stake(challenge_id, bench.user_id(user_number), 'YES', 1),
            payout_place_stake(challenge_id, bench.user_id(user_number + 1), 'NO', 1);
END $$;

-- Challenges that are over, written behind the back of the books.
CREATE PROCEDURE bench.completed_challenges(challenges bigint)
LANGUAGE sql AS $$
    INSERT INTO payoutq.challenge (title, currency, fee_bps, due_at, status, result, job_id, yes_pool, no_pool, yes_stakes,
                                   no_stakes, closed_at, resolved_at, completed_at)
    SELECT 'over', 'USD', 0, at, 'completed', 'draw', -n, 0, 0, 0, 0, at, at, at
      FROM generate_series(timestamptz '2020-01-01', timestamptz '2020-01-01' + (challenges - 1) * interval '1 minute', '1 minute')
           WITH ORDINALITY AS over (at, n)
$$;
