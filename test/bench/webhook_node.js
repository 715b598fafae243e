// The receiver that one would write in an afternoon, to compare with: plain http
// and the npm package pg; the signature is verified, the event recorded once, and
// the status of its message set.
//
//	node webhook_node.js PORT transaction|statement SECRET
//
// transaction: BEGIN, INSERT, UPDATE, COMMIT for each event.  statement: all in one.
'use strict';
const crypto = require('crypto');
const http = require('http');
const { Pool } = require('pg');

const [port, mode, secret] = process.argv.slice(2);
const key = Buffer.from(secret.slice('whsec_'.length), 'base64');
const pool = new Pool({ max: 20 });
pool.on('error', (error) => console.error(error.code));

const insert = `INSERT INTO plain.node_events (dedupe_key, event, sent_id, payload) VALUES ($1, $2, $3, $4)
  ON CONFLICT DO NOTHING`;
const upsert = `INSERT INTO plain.node_deliveries (sent_id, status, status_at) VALUES ($1, $2, $3)
  ON CONFLICT (sent_id) DO UPDATE SET status = excluded.status, status_at = excluded.status_at
  WHERE node_deliveries.status_at <= excluded.status_at`;
const both = `WITH event AS (${insert} RETURNING 1)
  INSERT INTO plain.node_deliveries (sent_id, status, status_at) SELECT $3, $5, $6 FROM event
  ON CONFLICT (sent_id) DO UPDATE SET status = excluded.status, status_at = excluded.status_at
  WHERE node_deliveries.status_at <= excluded.status_at`;

function verify(headers, body) {
  const id = headers['x-webhook-id'];
  const timestamp = headers['x-webhook-timestamp'];
  const given = Buffer.from(headers['x-webhook-signature'] || '');
  const mac = crypto.createHmac('sha256', key).update(`${id}.${timestamp}.`).update(body).digest('base64');
  const expected = Buffer.from(`v1,${mac}`);
  return given.length === expected.length && crypto.timingSafeEqual(given, expected) &&
    Math.abs(Date.now() / 1000 - Number(timestamp)) <= 300;
}

async function store(body) {
  const { event, payload } = JSON.parse(body);
  const dedupe = `${payload.message_id}:${event}:${payload.updated_at}`;
  const status = payload.message_status.toLowerCase();
  if (mode === 'statement') {
    await pool.query({ name: 'both', text: both,
      values: [dedupe, event, payload.message_id, body.toString(), status, payload.updated_at] });
    return;
  }
  const client = await pool.connect();
  try {
    await client.query('BEGIN');
    const { rowCount } = await client.query({ name: 'insert', text: insert,
      values: [dedupe, event, payload.message_id, body.toString()] });
    if (rowCount === 1)
      await client.query({ name: 'upsert', text: upsert, values: [payload.message_id, status, payload.updated_at] });
    await client.query('COMMIT');
  } catch (error) {
    await client.query('ROLLBACK');
    throw error;
  } finally {
    client.release();
  }
}

http.createServer((request, response) => {
  const chunks = [];
  request.on('data', (chunk) => chunks.push(chunk));
  request.on('end', async () => {
    const body = Buffer.concat(chunks);
    let status = 401;
    if (verify(request.headers, body)) {
      try {
        await store(body);
        status = 200;
      } catch (error) {
        status = 503;
      }
    }
    const answer = status === 200 ? '{"received": true}' : '{"error": "refused"}';
    response.writeHead(status, { 'Content-Type': 'application/json', 'Content-Length': answer.length });
    response.end(answer);
  });
}).listen(port, '127.0.0.1');
