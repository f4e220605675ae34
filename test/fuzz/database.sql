-- What the fuzzers find in their database.
CREATE EXTENSION payoutq;
CREATE SERVER fuzzed FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'webhook', base_url 'https://fuzzed.invalid');
CREATE USER MAPPING FOR PUBLIC SERVER fuzzed OPTIONS (webhook_secret 'whsec_fuzz');
CREATE FUNCTION payoutq_fuzz(text[]) RETURNS void LANGUAGE C AS '$libdir/payoutq';
