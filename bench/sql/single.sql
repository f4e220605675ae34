BEGIN;
SELECT id, user_id, amount FROM queue.entry WHERE job_id = :job AND status = 'pending' ORDER BY seq LIMIT 1 FOR UPDATE SKIP LOCKED \gset
UPDATE payoutq.account SET balance = balance + :amount WHERE user_id = :user_id AND currency = 'USD';
INSERT INTO queue.ledger (entry_id, amount, user_id) VALUES (:id, :amount, :user_id);
UPDATE queue.entry SET status = 'completed', processed_at = now() WHERE id = :id;
COMMIT;
