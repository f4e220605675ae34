// A Pusher-compatible server to test against: soketi, with the limits of Pusher.
//
//   node server.js [--port N] [--id ID] [--key KEY] [--secret SECRET]
//
// Prints "listening PORT", and ends when its input does.
'use strict';
process.env.AWS_SDK_JS_SUPPRESS_MAINTENANCE_MODE_MESSAGE = '1';
const crypto = require('crypto');
const net = require('net');
const { Server } = require('@soketi/soketi/dist/server');
const { HttpHandler } = require('@soketi/soketi/dist/http-handler');
const { Log } = require('@soketi/soketi/dist/log');

const options = { port: 0, id: '3', key: '278d425bdf160c739803', secret: '7ad3773142a6692b25b8' };
for (let i = 2; i + 1 < process.argv.length; i += 2)
	options[process.argv[i].slice(2)] = process.argv[i + 1];

// Pusher refuses these as documented, soketi lets them pass: another key, an old
// timestamp, a wrong body_md5, and names of channels.
const { signatureIsValid, checkMessageToBroadcast } = HttpHandler.prototype;
HttpHandler.prototype.signatureIsValid = function (res) {
	const { auth_key, auth_timestamp, auth_version, body_md5 } = res.query;
	const md5 = crypto.createHash('md5').update(res.rawBody || '').digest('hex');
	const known = auth_key === res.app.key && auth_version === '1.0'
		&& Math.abs(Date.now() / 1000 - auth_timestamp) <= 600
		&& (!res.rawBody || body_md5 === md5);
	return known ? signatureIsValid.call(this, res) : Promise.resolve(false);
};
HttpHandler.prototype.checkMessageToBroadcast = function (message, app) {
	const names = message.channels || [message.channel];
	if (!names.every(name => /^(#server-to-user-)?[\w\-=@,.;]+$/.test(name) && name.length <= 164))
		return Promise.reject({ code: 400, message: 'Invalid channel name' });
	return checkMessageToBroadcast.call(this, message, app);
};

// Headers before the status make it 200, whatever the answer is.
HttpHandler.prototype.corsMiddleware = (res, next) => next(null, res);

// Its discovery of other nodes would broadcast to the network.
Server.prototype.configureDiscovery = () => Promise.resolve();
for (const name of ['br', 'info', 'successTitle'])
	Log[name] = () => {};

function start(port) {
	Server.start({
		host: '127.0.0.1', port,
		'metrics.host': '127.0.0.1', 'metrics.port': 0,
		'appManager.array.apps.0.id': options.id,
		'appManager.array.apps.0.key': options.key,
		'appManager.array.apps.0.secret': options.secret,
		'channelLimits.maxNameLength': 164, 'eventLimits.maxPayloadInKb': 10,
	}, server => {
		if (!server.serverProcess)
			process.exit(1);
		console.log(`listening ${port}`);
	});
}

// The server would share a port with another one of its kind, each getting a part
// of the connections, and could not take a port again that it got as 0: so the
// port is chosen here.
const probe = net.createServer().listen(Number(options.port), '127.0.0.1', () => {
	const { port } = probe.address();
	probe.close(() => start(port));
});
process.stdin.resume().on('end', () => process.exit(0));
