// A provider to test against: transfers with the semantics that Stripe documents
// for idempotency keys, a service of kind "webhook", its own books, and faults by
// a seed or by rules.
//
//   node provider.js [--port N] [--seed N] [--faults SHARE] [--latency MS] [--kinds a,b] [--hooks SECRET]
//
// Prints "listening PORT", and ends when its input does.
//
//   GET    /books      all transfers that were made
//   GET    /requests   requests as they came, the last 5,000
//   GET    /measures   the most calls that were under way at once, in all and to one destination
//   GET    /faults     how often each fault was injected; ?share=0.2 changes their share
//   GET    /hooks      web hooks since the last time, signed with SECRET: each before its transfer is
//                      answered, in any order, some of them twice
//   POST   /rules      what the next calls for a destination get: see "faults"
//   DELETE /rules      forgets them
//   POST   /release    ends the waiting of answers with "hold"
//   DELETE /requests   forgets requests and measures
//
// A service of kind "webhook" is at POST /pay and GET /status?reference=.
'use strict';
const http = require('http');
const crypto = require('crypto');

const options = { port: 0, seed: 1, faults: 0, latency: 0, kinds: '', hooks: '' };
for (let i = 2; i + 1 < process.argv.length; i += 2)
  options[process.argv[i].slice(2)] = process.argv[i + 1];
let share = Number(options.faults);
const latency = Number(options.latency);

// unreached: before the layer of idempotency, nothing is done or stored.
// Otherwise the transfer is made (unless fails) and 200 is stored under the key,
// or with stored what is answered.  The answer is status, code and headers, or
// body; or none (silent), or the end of the connection (drop).  Between making
// the transfer and answering there is a delay; with late it is before.
const faults = {
  reset: { unreached: true, drop: true },
  silent: { unreached: true, silent: true },
  refuse: { unreached: true, refuse: 150 },
  409: { unreached: true, status: 409, type: 'idempotency_error', code: 'idempotency_key_in_use' },
  429: { unreached: true, status: 429, code: 'lock_timeout' },
  '429-limited': { unreached: true, status: 429, code: 'rate_limit', headers: { 'Stripe-Rate-Limited-Reason': 'global-rate' } },
  503: { unreached: true, status: 503, type: 'api_error' },
  500: { fails: true, stored: true, status: 500, type: 'api_error' },
  '500-done': { stored: true, status: 500, type: 'api_error' },
  '502-done': { status: 502, body: '<html>' },
  lost: { drop: true },
  'silent-done': { silent: true },
  slow: { delay: 1800, late: true },
  'slow-done': { delay: 1800 },
  garbage: { body: '<html>' },
};
const kinds = options.kinds ? options.kinds.split(',') : Object.keys(faults);
const injected = {};
let rules = [];
let held = [];
let requests = [];
let measures = { calls: 0, destination: 0 };
let calls = 0;
const calling = new Map();    // destination -> calls under way

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
const keys = new Map();       // idempotency key -> { hash, running, result }

// A rule is used up, after so many times; else it is chance.
function fault_for(destination) {
  const rule = rules.find((r) => r.destination === destination);
  if (rule) {
    if (--rule.times <= 0) rules = rules.filter((r) => r !== rule);
    return { ...faults[rule.fault], ...rule };
  }
  if (random() >= share) return {};
  let kind = kinds[Math.floor(random() * kinds.length)];
  // It disturbs all calls at once, so it is rare.
  if (kind === 'refuse' && kinds.length > 1 && random() > 0.05) kind = 'reset';
  injected[kind] = (injected[kind] || 0) + 1;
  const fault = { ...faults[kind] };
  if (fault.delay) fault.delay *= random();
  return fault;
}

function error(status, code, type, headers) {
  return { status, headers, body: JSON.stringify({ error: { type: type || 'invalid_request_error', code, message: code || type } }) };
}

function answer(call, result) {
  const { res } = call;
  if (res.destroyed || res.socket === null) return;
  res.writeHead(result.status, { 'Content-Type': 'application/json', ...result.headers });
  res.end(result.body);
}

// What the fault makes of a result.
function respond(call, result) {
  const { fault } = call;
  if (fault.refuse) return refuse(fault.refuse);
  if (fault.drop) return void call.res.socket?.destroy();
  if (fault.silent) return undefined;
  const body = fault.long ? 'x'.repeat(fault.long) : fault.hex ? Buffer.from(fault.hex, 'hex') : fault.body;
  if (body !== undefined) result = { status: fault.status || 200, headers: fault.headers, body };
  else if (fault.status) result = error(fault.status, fault.code, fault.type, fault.headers);
  if (fault.hold) return void held.push(() => answer(call, result));
  return void setTimeout(answer, latency, call, result);
}

// Nobody listens for a while, and who was connected is no longer.
const sockets = new Set();
function refuse(milliseconds) {
  if (!server.listening) return;
  const port = server.address().port;
  server.close();
  for (const socket of sockets) socket.destroy();
  setTimeout(() => server.listen(port, '127.0.0.1'), milliseconds);
}

// A result is stored under a key once, and given again.
function idempotent(call, key, body, execute) {
  const { fault } = call;
  if (fault.unreached) return respond(call);

  const hash = crypto.createHash('sha256').update(body).digest('hex');
  const known = keys.get(key);
  if (known) {
    if (known.hash !== hash) return respond(call, error(400, undefined, 'idempotency_error'));
    if (known.running) return respond(call, error(409, 'idempotency_key_in_use', 'idempotency_error'));
    return respond(call, { ...known.result, headers: { 'Idempotent-Replayed': 'true' } });
  }

  const entry = { hash, running: true };
  keys.set(key, entry);
  const finish = () => {
    const made = fault.fails ? null : execute();
    entry.running = false;
    entry.result = fault.stored ? error(fault.status, fault.code, fault.type) : made;
    return made;
  };
  if (!fault.delay) return respond(call, finish());
  if (fault.late) return void setTimeout(() => respond(call, finish()), fault.delay);
  return void setTimeout(respond, fault.delay, call, finish());
}

function create(call, body) {
  const { req } = call;
  const form = Object.fromEntries(new URLSearchParams(body));
  if (!/^Bearer sk_/.test(req.headers.authorization || ''))
    return respond(call, error(401, 'api_key_missing'));
  const key = req.headers['idempotency-key'];
  return idempotent(call, key, body, () => {
    if (!/^acct_/.test(form.destination || '')) return error(404, 'resource_missing');
    if (/^acct_closed/.test(form.destination)) return error(400, 'account_closed');
    const transfer = {
      id: 'tr_' + (transfers.size + 1), object: 'transfer', amount: Number(form.amount), currency: form.currency,
      destination: form.destination, transfer_group: form.transfer_group, reversed: false,
      created: Math.floor(Date.now() / 1000),
      metadata: Object.fromEntries(Object.entries(form).filter(([name]) => /^metadata\[.*\]$/.test(name))
        .map(([name, value]) => [name.slice(9, -1), value])),
      key,
    };
    transfers.set(transfer.id, transfer);
    if (options.hooks) emit('transfer.created', transfer);
    return { status: 200, body: JSON.stringify(transfer) };
  });
}

// Somewhere among the last ones; one of five comes again.
let hooks = [];
let events = 0;
function emit(type, object) {
  const body = JSON.stringify({ id: 'evt_' + ++events, object: 'event', type, data: { object } });
  for (let times = random() < 0.2 ? 2 : 1; times > 0; times--)
    hooks.splice(hooks.length - Math.floor(random() * Math.min(10, hooks.length + 1)), 0, body);
}

function sign(body) {
  const now = Math.floor(Date.now() / 1000);
  const signature = crypto.createHmac('sha256', options.hooks).update(`${now}.${body}`).digest('hex');
  return { headers: { 'Stripe-Signature': `t=${now},v1=${signature}` }, body };
}

function pay(call, body) {
  const order = JSON.parse(body);
  return idempotent(call, order.idempotency_key, body, () => {
    const transfer = { id: 'pay_' + order.transfer_id, amount: order.amount, currency: order.currency,
                       destination: order.destination, key: order.idempotency_key,
                       metadata: { payoutq_transfer: String(order.transfer_id) } };
    transfers.set(transfer.id, transfer);
    return { status: 200, body: JSON.stringify({ status: 'completed', reference: transfer.id }) };
  });
}

function list(call, query) {
  const is = (name, value) => query.get(name) === null || query.get(name) === value;
  const wanted = [...transfers.values()].filter((t) =>
    is('destination', t.destination) && is('transfer_group', t.transfer_group)).reverse();
  const from = wanted.findIndex((t) => t.id === query.get('starting_after')) + 1;
  const limit = Number(query.get('limit') || 10);
  respond(call, { status: 200, body: JSON.stringify({ object: 'list', data: wanted.slice(from, from + limit),
                                                      has_more: wanted.length > from + limit }) });
}

function count(call, destination) {
  calls++;
  calling.set(destination, (calling.get(destination) || 0) + 1);
  measures.calls = Math.max(measures.calls, calls);
  measures.destination = Math.max(measures.destination, calling.get(destination));
  call.res.on('close', () => {
    calls--;
    calling.set(destination, calling.get(destination) - 1);
    if (calling.get(destination) === 0) calling.delete(destination);
  });
}

function destination_of(path, body) {
  try {
    return path === '/pay' ? JSON.parse(body).destination : new URLSearchParams(body).get('destination');
  } catch (e) {
    return undefined;
  }
}

// For the tests
const controls = {
  'GET /books': () => [...transfers.values()],
  'GET /requests': () => requests,
  'GET /measures': () => measures,
  'GET /faults': (body, query) => {
    if (query.get('share') !== null) share = Number(query.get('share'));
    return injected;
  },
  'GET /hooks': () => hooks.splice(0).map(sign),
  'POST /rules': (body) => {
    rules.push({ times: 1, ...JSON.parse(body) });
    return rules;
  },
  'DELETE /rules': () => {
    rules = [];
    return true;
  },
  'POST /release': () => {
    const ready = held;
    held = [];
    ready.forEach((go) => go());
    return ready.length;
  },
  'DELETE /requests': () => {
    requests = [];
    measures = { calls: 0, destination: 0 };
    return true;
  },
};

function route(req, res, body) {
  const url = new URL(req.url, 'http://localhost');
  const control = controls[`${req.method} ${url.pathname}`];
  const call = { req, res, fault: {} };
  if (control) return answer(call, { status: 200, body: JSON.stringify(control(body, url.searchParams)) });

  requests.push({ at: Date.now(), method: req.method, url: req.url, headers: req.headers, raw_headers: req.rawHeaders, body });
  if (requests.length > 5000) requests.shift();
  if (req.method === 'POST' && (url.pathname === '/v1/transfers' || url.pathname === '/pay')) {
    const destination = destination_of(url.pathname, body);
    count(call, destination);
    call.fault = fault_for(destination);
    return url.pathname === '/pay' ? pay(call, body) : create(call, body);
  }
  // Questions: rules are for the address.
  if (rules.some((r) => r.destination === url.pathname)) call.fault = fault_for(url.pathname);
  if (req.method === 'GET' && url.pathname === '/v1/transfers') return list(call, url.searchParams);
  if (req.method === 'GET' && url.pathname.startsWith('/v1/transfers/')) {
    const transfer = transfers.get(decodeURIComponent(url.pathname.slice(14)));
    return respond(call, transfer ? { status: 200, body: JSON.stringify(transfer) } : error(404, 'resource_missing'));
  }
  if (req.method === 'GET' && url.pathname === '/status')
    return respond(call, { status: 200, body: JSON.stringify(transfers.has(url.searchParams.get('reference'))
      ? { status: 'completed' } : { status: 'sent' }) });
  return respond(call, error(404, 'unknown_path'));
}

const server = http.createServer((req, res) => {
  const chunks = [];
  req.on('data', (chunk) => chunks.push(chunk));
  req.on('error', () => {});
  req.on('end', () => route(req, res, Buffer.concat(chunks).toString()));
});
server.on('connection', (socket) => {
  sockets.add(socket);
  socket.on('close', () => sockets.delete(socket));
});
server.keepAliveTimeout = 60000;
server.once('listening', () => console.log('listening ' + server.address().port));
server.listen(Number(options.port), '127.0.0.1');
process.stdin.on('end', () => process.exit(0)).resume();
