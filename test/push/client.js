// A Pusher client: appends each event that it receives to a file, as a line of JSON.
//
//   node client.js --port N --out FILE [--key KEY] [--secret SECRET] CHANNEL...
//
// Private channels are authorized with the secret, as the server of an application
// would do.  Prints "subscribed CHANNEL", again after each reconnection, or "refused
// CHANNEL", and "state NEW"; ends when its input does.
'use strict';
const fs = require('fs');
const Pusher = require('pusher-js');
const Sender = require('pusher');

const options = { port: 0, out: '', key: '278d425bdf160c739803', secret: '7ad3773142a6692b25b8' };
const channels = [];
for (let i = 2; i < process.argv.length; i++)
	if (process.argv[i].startsWith('--'))
		options[process.argv[i].slice(2)] = process.argv[++i];
	else
		channels.push(process.argv[i]);

const application = new Sender({ appId: '0', key: options.key, secret: options.secret, cluster: 'none' });
const pusher = new Pusher(options.key, {
	cluster: 'none', wsHost: '127.0.0.1', wsPort: Number(options.port), forceTLS: false,
	enabledTransports: ['ws'],
	channelAuthorization: {
		customHandler: ({ socketId, channelName }, done) =>
			done(null, application.authorizeChannel(socketId, channelName)),
	},
});
for (const state of ['connected', 'unavailable', 'failed'])
	pusher.connection.bind(state, () => console.log(`state ${state}`));
for (const name of channels)
	pusher.subscribe(name).bind_global((event, data) => {
		if (event === 'pusher:subscription_succeeded')
			console.log(`subscribed ${name}`);
		else if (event === 'pusher:subscription_error')
			console.log(`refused ${name}`);
		else
			fs.appendFileSync(options.out, JSON.stringify({ channel: name, event, data }) + '\n');
	});
// By itself it waits 15, 30, then 60 s for a server that was away.
setInterval(() => {
	if (['connecting', 'unavailable'].includes(pusher.connection.state)) {
		pusher.disconnect();
		pusher.connect();
	}
}, 500);
process.stdin.resume().on('end', () => process.exit(0));
