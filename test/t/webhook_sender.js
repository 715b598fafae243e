// Post events to a receiver, signed by the npm package standardwebhooks, over many
// connections at once; print how often each status was answered.
//
//	node webhook_sender.js PORT CONNECTIONS SECRET WEBHOOK_ID < one body a line
//
// The package is found through NODE_PATH.
'use strict';
const http = require('http');
const readline = require('readline');
const { Webhook } = require('standardwebhooks');

const [port, connections, secret, id] = process.argv.slice(2);
const agent = new http.Agent({ keepAlive: true, maxSockets: Number(connections) });
const webhook = new Webhook(secret);
const statuses = {};

function post(body) {
  const now = new Date();
  const bytes = Buffer.from(body);
  return new Promise((resolve) => {
    const request = http.request({
      agent, port, host: '127.0.0.1', method: 'POST', path: '/webhooks/sent',
      headers: {
        'Content-Type': 'application/json', 'Content-Length': bytes.length,
        'X-Webhook-ID': id, 'X-Webhook-Timestamp': Math.floor(now / 1000),
        'X-Webhook-Signature': webhook.sign(id, now, body),
      },
    }, (answer) => {
      answer.resume();
      answer.on('end', () => resolve(answer.statusCode));
    });
    request.on('error', (error) => resolve(error.code));
    request.end(bytes);
  });
}

async function work(bodies) {
  for (let body = bodies.pop(); body !== undefined; body = bodies.pop()) {
    const status = await post(body);
    statuses[status] = (statuses[status] || 0) + 1;
  }
}

async function main() {
  const bodies = [];
  for await (const line of readline.createInterface({ input: process.stdin })) bodies.push(line);
  await Promise.all(Array.from({ length: Number(connections) }, () => work(bodies)));
  agent.destroy();
  console.log(JSON.stringify(statuses));
}

main();
