// A provider to test against: transfers with the semantics that Stripe documents
// for idempotency keys, its own books, and faults by a seed.
//
//   node provider.js [--port N] [--seed N] [--faults 0.2] [--latency MS] [--kinds a,b]
//
// Prints "listening PORT".  GET /books answers with all transfers that were made,
// GET /faults with how often each fault was injected, POST /faults?share=0 changes
// their share.
'use strict';
const http = require('http');
const crypto = require('crypto');

const options = { port: 0, seed: 1, faults: 0, latency: 0, kinds: '' };
for (let i = 2; i + 1 < process.argv.length; i += 2)
  options[process.argv[i].slice(2)] = process.argv[i + 1];
let share = Number(options.faults);

// Faults before the transfer is made, and after.
const before = ['reset', 'silent', '500', '503', '409', '429', '429-limited', 'slow'];
const after = ['lost', 'silent-done', '500-done', '502-done', 'slow-done', 'garbage'];
const kinds = options.kinds ? options.kinds.split(',') : before.concat(after);
const injected = {};

// A small generator with a seed: mulberry32.
let state = Number(options.seed) >>> 0;
function random() {
  state = (state + 0x6d2b79f5) >>> 0;
  let t = state;
  t = Math.imul(t ^ (t >>> 15), t | 1);
  t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
}

const transfers = new Map();  // id -> transfer
const keys = new Map();       // idempotency key -> { hash, status, body } or { running }

function error(status, type, code, headers) {
  return { status, headers, body: JSON.stringify({ error: { type, code, message: code || type } }) };
}

function execute(form, key) {
  if (!/^acct_/.test(form.destination || ''))
    return error(404, 'invalid_request_error', 'resource_missing');
  if (/^acct_closed/.test(form.destination))
    return error(400, 'invalid_request_error', 'account_closed');
  const transfer = {
    id: 'tr_' + (transfers.size + 1), object: 'transfer', amount: Number(form.amount), currency: form.currency,
    destination: form.destination, transfer_group: form.transfer_group, reversed: false,
    created: Math.floor(Date.now() / 1000),
    metadata: { payoutq_transfer: form['metadata[payoutq_transfer]'], payoutq_key: form['metadata[payoutq_key]'] },
    key,
  };
  transfers.set(transfer.id, transfer);
  return { status: 200, body: JSON.stringify(transfer) };
}

function answer(res, result, delay) {
  setTimeout(() => {
    if (res.destroyed || res.socket === null) return;
    res.writeHead(result.status, { 'Content-Type': 'application/json', ...result.headers });
    res.end(result.body);
  }, delay);
}

function create(req, res, body) {
  const key = req.headers['idempotency-key'];
  const latency = Number(options.latency);
  if (!/^Bearer sk_/.test(req.headers.authorization || ''))
    return answer(res, error(401, 'invalid_request_error', 'api_key_missing'), latency);
  const form = Object.fromEntries(new URLSearchParams(body));
  const hash = crypto.createHash('sha256').update(body).digest('hex');
  const fault = random() < share ? kinds[Math.floor(random() * kinds.length)] : '';
  if (fault) injected[fault] = (injected[fault] || 0) + 1;

  // Before the layer of idempotency, and stored nowhere
  if (fault === 'reset') return req.socket.destroy();
  if (fault === 'silent') return undefined;
  if (fault === '503') return answer(res, error(503, 'api_error'), latency);
  if (fault === '409') return answer(res, error(409, 'idempotency_error', 'idempotency_key_in_use'), latency);
  if (fault === '429') return answer(res, error(429, 'invalid_request_error', 'lock_timeout'), latency);
  if (fault === '429-limited')
    return answer(res, error(429, 'invalid_request_error', 'rate_limit', { 'Stripe-Rate-Limited-Reason': 'global-rate' }), latency);

  const stored = keys.get(key);
  if (stored) {
    if (stored.running) return answer(res, error(409, 'idempotency_error', 'idempotency_key_in_use'), latency);
    if (stored.hash !== hash) return answer(res, error(400, 'idempotency_error'), latency);
    return answer(res, { ...stored.result, headers: { 'Idempotent-Replayed': 'true' } }, latency);
  }
  let result = fault === '500' ? error(500, 'api_error') : execute(form, key);
  if (fault === '500-done') result = error(500, 'api_error');
  keys.set(key, { hash, result });

  if (fault === 'lost') return setTimeout(() => req.socket.destroy(), latency);
  if (fault === 'silent-done') return undefined;
  if (fault === '502-done') return answer(res, error(502, 'api_error'), latency);
  if (fault === 'garbage') return answer(res, { status: 200, body: '<html>' }, latency);
  return answer(res, result, /^slow/.test(fault) ? latency + 2000 * random() : latency);
}

function list(url, res) {
  const wanted = [...transfers.values()].filter((t) =>
    (!url.searchParams.get('destination') || t.destination === url.searchParams.get('destination')) &&
    (!url.searchParams.get('transfer_group') || t.transfer_group === url.searchParams.get('transfer_group'))).reverse();
  const start = url.searchParams.get('starting_after');
  const from = start ? wanted.findIndex((t) => t.id === start) + 1 : 0;
  const limit = Number(url.searchParams.get('limit') || 10);
  answer(res, { status: 200, body: JSON.stringify({ object: 'list', data: wanted.slice(from, from + limit),
                                                    has_more: wanted.length > from + limit }) }, Number(options.latency));
}

const server = http.createServer((req, res) => {
  const chunks = [];
  req.on('data', (chunk) => chunks.push(chunk));
  req.on('error', () => {});
  req.on('end', () => {
    const body = Buffer.concat(chunks).toString();
    const url = new URL(req.url, 'http://localhost');
    if (url.pathname === '/books') return answer(res, { status: 200, body: JSON.stringify([...transfers.values()]) }, 0);
    if (url.pathname === '/faults') {
      if (url.searchParams.get('share') !== null) share = Number(url.searchParams.get('share'));
      return answer(res, { status: 200, body: JSON.stringify(injected) }, 0);
    }
    if (req.method === 'POST' && url.pathname === '/v1/transfers') return create(req, res, body);
    if (req.method === 'GET' && url.pathname === '/v1/transfers') return list(url, res);
    if (req.method === 'GET' && url.pathname.startsWith('/v1/transfers/')) {
      const transfer = transfers.get(decodeURIComponent(url.pathname.slice(14)));
      return answer(res, transfer ? { status: 200, body: JSON.stringify(transfer) }
        : error(404, 'invalid_request_error', 'resource_missing'), Number(options.latency));
    }
    return answer(res, error(404, 'invalid_request_error', 'unknown_path'), 0);
  });
});
server.keepAliveTimeout = 60000;
server.listen(Number(options.port), '127.0.0.1', () => console.log('listening ' + server.address().port));
