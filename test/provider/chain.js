// A chain to test against: the node of hardhat behind a JSON-RPC server that can
// be told to misbehave.  (Not ganache's: version 7.9.2 executes a transaction that it
// is sent twice, twice.)
//
//   node chain.js
//
// Prints "listening PORT", and ends when its input does.
//
//   POST /        JSON-RPC
//   POST /rules   what calls of a method get, after so many that are left alone: see "faults"
//   GET  /calls   how many there were of each method, and how many were held, that is
//                 get no answer, since the last rules
//   GET  /books   all transactions in blocks: block, nonce, to, value, hash and status
'use strict';
const http = require('http');
const path = require('path');

process.env.HARDHAT_CONFIG = path.join(__dirname, 'hardhat.config.js');
const signer = path.join(__dirname, '../../examples/evm/signer.js');
const { network } = require('module').createRequire(signer)('hardhat');
const node = (method, ...params) => network.provider.send(method, params);

// Whether the call reaches the node, and what the caller learns: nothing, as long
// as he waits; the end of the connection; an answer without a result; or all.
const faults = {
  unreached: { reaches: false, silent: true },
  silent: { reaches: true, silent: true },
  lost: { reaches: true, drop: true },
  refused: { reaches: false, drop: true },
  empty: { reaches: false },
};
let rules = [];
let calls = { held: 0 };

function fault_for(method) {
  const rule = rules.find((r) => r.method === method);
  if (!rule || rule.after-- > 0) return { reaches: true };
  if (--rule.times <= 0) rules = rules.filter((r) => r !== rule);
  return faults[rule.fault];
}

async function call(request, response) {
  const fault = fault_for(request.method);
  calls[request.method] = (calls[request.method] || 0) + 1;
  const answer = { jsonrpc: '2.0', id: request.id };
  if (fault.reaches) {
    try {
      answer.result = await node(request.method, ...(request.params || []));
    } catch (error) {
      answer.error = { code: error.code || -32603, message: error.message };
    }
  }
  if (fault.drop) response.destroy();
  else if (fault.silent) calls.held += 1;
  else reply(response, answer);
}

async function books() {
  const made = [];
  const head = Number(await node('eth_blockNumber'));
  for (let i = 0; i <= head; i += 1) {
    const block = await node('eth_getBlockByNumber', `0x${i.toString(16)}`, true);
    for (const t of block.transactions) {
      const receipt = await node('eth_getTransactionReceipt', t.hash);
      made.push({ block: i, nonce: Number(t.nonce), to: t.to, value: BigInt(t.value).toString(), hash: t.hash,
        status: Number(receipt.status) });
    }
  }
  return made;
}

function reply(response, what) {
  response.writeHead(200, { 'content-type': 'application/json' });
  response.end(JSON.stringify(what));
}

const server = http.createServer(async (request, response) => {
  let body = '';
  for await (const part of request) body += part;
  if (request.url === '/') await call(JSON.parse(body), response);
  else if (request.url === '/calls') reply(response, calls);
  else if (request.url === '/books') reply(response, await books());
  else {
    rules = [].concat(JSON.parse(body)).map((r) => ({ after: 0, times: 1, ...r }));
    calls = { held: 0 };
    reply(response, true);
  }
});
server.listen(0, '127.0.0.1', () => console.log(`listening ${server.address().port}`));
process.stdin.on('end', () => process.exit(0)).resume();
