-- What the signer keeps in the application's database. Back it up, and restore
-- it, together with payoutq's own tables: it is what keeps a transfer from
-- being sent under a second nonce.

-- One row for each account that sends. Its lock is what signers queue for.
CREATE TABLE evm_sender (
  chain_id   bigint NOT NULL,
  address    text NOT NULL,
  next_nonce bigint NOT NULL,
  PRIMARY KEY (chain_id, address)
);

-- Committed before the chain sees it, and never changed after that: whatever
-- happens, what is sent for a key is this very transaction.
CREATE TABLE evm_transaction (
  idempotency_key text PRIMARY KEY,
  chain_id        bigint NOT NULL,
  sender          text NOT NULL,
  nonce           bigint NOT NULL,
  recipient       text NOT NULL,
  value           numeric NOT NULL,     -- in wei
  hash            text NOT NULL UNIQUE,
  raw             text NOT NULL,
  signed_at       timestamptz NOT NULL DEFAULT now(),
  sent_at         timestamptz,          -- a node had it
  block           bigint,               -- it was in, when it was final
  UNIQUE (chain_id, sender, nonce),
  FOREIGN KEY (chain_id, sender) REFERENCES evm_sender
);
