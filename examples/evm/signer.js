#!/usr/bin/env node
// Sends the transfers of a provider of kind "external" on an EVM chain, as plain
// payments in the chain's own coin, and confirms them once they are final.
//
// The nonce is what pays once: of all transactions with one nonce a chain takes
// one.  So a transfer is given its nonce, signed and committed to evm_transaction
// before anybody sees it, and whatever happens then, the same bytes are sent
// again, never others.  This process can be killed at any point, and several may
// run at once.
import { setTimeout as sleep } from 'node:timers/promises';
import { getAddress, isHexString, keccak256, Wallet } from 'ethers';
import pg from 'pg';

const env = process.env;            // and PGHOST, PGDATABASE, ... for the database
for (const name of ['EVM_CHAIN_ID', 'EVM_KEY'])
	if (!env[name]) throw new Error(`${name} is not set`);
const url = env.EVM_RPC ?? 'http://127.0.0.1:8545';
const provider = env.EVM_PROVIDER ?? 'evm';
const currency = env.EVM_CURRENCY ?? 'ETH';
const unit = 10n ** BigInt(env.EVM_UNIT_DIGITS ?? 9);  // wei in one of payoutq's units: 1 gwei
const confirmations = BigInt(env.EVM_CONFIRMATIONS ?? 12);
const maxFee = BigInt(env.EVM_MAX_FEE_GWEI ?? 100) * 10n ** 9n;
const tip = BigInt(env.EVM_TIP_GWEI ?? 1) * 10n ** 9n;
const gasLimit = BigInt(env.EVM_GAS ?? 60000);         // more than 21000 for wallets that are contracts
const lease = env.EVM_LEASE ?? '1 minute';
const pause = Number(env.EVM_PAUSE_MS ?? 2000);
const many = 50;

const wallet = new Wallet(env.EVM_KEY);
const log = (what, error) => console.error(`${what}: ${error.message}`);

// A transaction must not be lost once the chain has seen it.  Each loop has its
// own connections, so that neither waits for the other's.
const [db, confirming] = [1, 2].map(() => {
	const pool = new pg.Pool({ max: 4, keepAlive: true, options: '-c synchronous_commit=on' });
	pool.on('connect', (client) => client.on('error', (error) => log('database', error)));
	return pool.on('error', () => {});      // the same of one that is idle
});

let calls = 0;
async function rpc(method, ...params) {
	const response = await fetch(url, {
		method: 'POST',
		headers: { 'content-type': 'application/json' },
		body: JSON.stringify({ jsonrpc: '2.0', id: ++calls, method, params }),
		signal: AbortSignal.timeout(10_000),
	});
	const { result, error } = await response.json();
	if (error) throw new Error(`${method}: ${error.message}`);
	return result;
}

// ---------------------------------------------------------------------------
// Send: claim, sign, commit, broadcast, report
// ---------------------------------------------------------------------------

async function send() {
	await checkNonce();
	const { rows } = await db.query('SELECT * FROM payout_claim_transfers($1, $2, $3)', [provider, many, lease]);
	const good = [];
	for (const transfer of rows) {
		const why = whyNot(transfer);
		if (why) await failed(transfer, 'permanent', why);
		else good.push(transfer);
	}
	const transactions = good.length ? await store(good) : new Map();
	await each(good, (transfer) => sendOne(transfer, transactions.get(transfer.idempotency_key)));
	return rows.length > 0;
}

// More on the chain than we know of: the key is used elsewhere, or this database
// is a copy that lacks what was sent since.  Signing would pay again.
async function checkNonce() {
	const mined = BigInt(await rpc('eth_getTransactionCount', wallet.address, 'latest'));
	await db.query('INSERT INTO evm_sender VALUES ($1, $2, $3) ON CONFLICT DO NOTHING', [chainId, wallet.address, mined]);
	const { rows } = await db.query('SELECT next_nonce FROM evm_sender WHERE chain_id = $1 AND address = $2', [chainId, wallet.address]);
	if (mined > BigInt(rows[0].next_nonce))
		throw new Error(`${wallet.address} has sent ${mined} transactions, of which evm_sender knows ${rows[0].next_nonce}: nothing is sent`);
}

// Only before it is signed is a failure definite.
function whyNot(transfer) {
	if (transfer.currency !== currency) return `the currency is not ${currency}`;
	if (!isHexString(transfer.destination, 20)) return 'the destination is not an address';
	try { getAddress(transfer.destination); } catch { return 'the checksum of the address is wrong'; }
	return null;
}

// Commits a transaction for each, the old one for those that have one.
async function store(transfers) {
	const client = await db.connect();
	let broken;
	try {
		await client.query('BEGIN');
		const sender = await client.query('SELECT next_nonce FROM evm_sender WHERE chain_id = $1 AND address = $2 FOR UPDATE',
			[chainId, wallet.address]);
		const old = await client.query('SELECT idempotency_key, recipient, value, hash, raw FROM evm_transaction WHERE idempotency_key = ANY ($1)',
			[transfers.map((t) => t.idempotency_key)]);
		const stored = new Map(old.rows.map((row) => [row.idempotency_key, row]));
		let nonce = Number(sender.rows[0].next_nonce);
		for (const { idempotency_key: key, destination, amount } of transfers) {
			const recipient = getAddress(destination);
			const value = BigInt(amount) * unit;
			const known = stored.get(key);
			if (known && (known.recipient !== recipient || BigInt(known.value) !== value))
				throw new Error(`evm_transaction has another payment under ${key}`);
			if (known) continue;
			const raw = await wallet.signTransaction({ type: 2, chainId, nonce, to: recipient, value, gasLimit,
				maxFeePerGas: maxFee, maxPriorityFeePerGas: tip });
			const { rows } = await client.query(`
				INSERT INTO evm_transaction (idempotency_key, chain_id, sender, nonce, recipient, value, hash, raw)
				VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING hash, raw`,
			[key, chainId, wallet.address, nonce++, recipient, value, keccak256(raw), raw]);
			stored.set(key, rows[0]);
		}
		await client.query('UPDATE evm_sender SET next_nonce = $3 WHERE chain_id = $1 AND address = $2', [chainId, wallet.address, nonce]);
		await client.query('COMMIT');
		return stored;
	} catch (error) {
		broken = error;
		throw error;
	} finally {
		client.release(broken);     // closes the connection, and so rolls back, if it is broken
	}
}

// From now on nobody may say that it failed: the nonces that follow need it.
async function sendOne(transfer, transaction) {
	try {
		await broadcast(transaction);
	} catch (error) {
		return failed(transfer, 'unknown', error.message);
	}
	return db.query(`
		WITH e AS (UPDATE evm_transaction SET sent_at = clock_timestamp() WHERE hash = $3)
		SELECT payout_transfer_sent($1, $2, $3)`, [transfer.transfer_id, transfer.attempt_token, transaction.hash]);
}

// "already known", "nonce too low", no answer: what matters is whether it is there.
async function broadcast({ hash, raw }) {
	try {
		await rpc('eth_sendRawTransaction', raw);
	} catch (error) {
		if (!await rpc('eth_getTransactionByHash', hash)) throw error;
	}
}

function failed(transfer, errorClass, reason) {
	console.error(`transfer ${transfer.transfer_id}: ${errorClass}: ${reason}`);
	return db.query('SELECT payout_transfer_failed($1, $2, $3, $4)', [transfer.transfer_id, transfer.attempt_token, errorClass, reason]);
}

// ---------------------------------------------------------------------------
// Confirm: final after so many blocks; what the chain has dropped is sent again
// ---------------------------------------------------------------------------

async function confirm() {
	const head = BigInt(await rpc('eth_blockNumber'));   // no answer is no number
	const { rows } = await confirming.query(`
		SELECT e.hash, e.raw FROM payout_transfers t JOIN evm_transaction e ON e.hash = t.provider_reference
		 WHERE t.provider = $1 AND t.status = 'sent' AND t.confirmed_at IS NULL AND e.chain_id = $2
		 ORDER BY e.nonce LIMIT $3`, [provider, chainId, many]);
	const confirmed = await each(rows, (transaction) => confirmOne(transaction, head));
	return confirmed.some((is) => is.value);
}

async function confirmOne(transaction, head) {
	const receipt = await rpc('eth_getTransactionReceipt', transaction.hash);
	if (!receipt) {
		if (!await rpc('eth_getTransactionByHash', transaction.hash)) await broadcast(transaction);
		return false;
	}
	const block = BigInt(receipt.blockNumber);
	if (head - block + 1n < confirmations) return false;
	const done = { '0x1': true, '0x0': false }[receipt.status];
	if (done === undefined) throw new Error(`${transaction.hash} has the status ${receipt.status}`);
	await confirming.query(`
		WITH e AS (UPDATE evm_transaction SET block = $4 WHERE hash = $2)
		SELECT payout_confirm_transfer($1, $2, $3, $5)`,
	[provider, transaction.hash, done, block, done ? null : 'the transaction was reverted']);
	return true;
}

// ---------------------------------------------------------------------------

// One that fails does not hold up the others; it comes again.
async function each(list, what) {
	const results = await Promise.allSettled(list.map(what));
	for (const { reason } of results) if (reason) log(what.name || 'transfer', reason);
	return results;
}

async function forever(step) {
	for (;;) {
		let busy = false;
		try { busy = await step(); } catch (error) { log(step.name, error); }
		if (!busy) await sleep(pause);
	}
}

const chainId = Number(env.EVM_CHAIN_ID);
if (Number(await rpc('eth_chainId')) !== chainId) throw new Error(`EVM_CHAIN_ID is not that of ${url}`);
forever(send);
forever(confirm);
