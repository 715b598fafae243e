// What an expert writes: undici's own pool instead of fetch, prepared statements, one
// update for a whole batch, and batches that overlap, so that 100 requests are always
// in flight and neither network nor database waits.  Reference of the bench.
//
//	node tuned.mjs URL [listen]		the database is in PGHOST and so on
//
// With listen it waits for notifications instead of being told to drain.
import pg from 'pg';
import { Pool } from 'undici';
import { serve } from './serve.mjs';

const BATCH = 100;
const LOOPS = 3;
const pool = new Pool(process.argv[2], { connections: 100 });
const clients = await Promise.all(Array.from({ length: LOOPS }, async () => {
  const client = new pg.Client();
  await client.connect();
  return client;
}));

const CLAIM = {
  name: 'claim',
  text: `SELECT id, recipient, template, parameters::text FROM node.messages
         WHERE state = 'queued' ORDER BY id LIMIT ${BATCH} FOR UPDATE SKIP LOCKED`,
};
const SETTLE = {
  name: 'settle',
  text: `UPDATE node.messages m
         SET state = CASE WHEN r.error IS NULL THEN 'accepted' ELSE 'failed' END,
             sent_id = r.sent_id, error = r.error, finished_at = now()
         FROM unnest($1::bigint[], $2::uuid[], $3::text[]) AS r(id, sent_id, error)
         WHERE m.id = r.id`,
};
const HEADERS = ['x-api-key', 'sk_test_of_the_bench', 'content-type', 'application/json', 'idempotency-key'];

async function send(row) {
  try {
    const { statusCode, body } = await pool.request({
      method: 'POST',
      path: '/v3/messages',
      headers: [...HEADERS, `node-${row.id}`],
      body: `{"to":["${row.recipient}"],"template":{"name":"${row.template}","parameters":${row.parameters}}}`,
    });
    const answer = JSON.parse(await body.text());
    if (statusCode >= 300)
      return { error: `${statusCode} ${answer.error?.code}` };
    return { sentId: answer.data.recipients[0].message_id };
  } catch (error) {
    return { error: String(error) };
  }
}

async function sendBatch(db) {
  await db.query('BEGIN');
  const { rows } = await db.query(CLAIM);
  const results = await Promise.all(rows.map(send));
  await db.query({
    ...SETTLE,
    values: [rows.map((row) => row.id), results.map((r) => r.sentId), results.map((r) => r.error)],
  });
  await db.query('COMMIT');
  return rows.length;
}

async function listen() {
  const listener = new pg.Client();
  let busy = false;
  let notified = false;
  listener.on('notification', async () => {
    notified = true;
    if (busy)
      return;
    busy = true;
    while (notified) {
      notified = false;
      while (await sendBatch(clients[0]) > 0);
    }
    busy = false;
  });
  await listener.connect();
  await listener.query('LISTEN queued');
  console.log('listening');
}

async function drain() {
  const sent = await Promise.all(clients.map(async (db) => {
    let total = 0;
    for (let n; (n = await sendBatch(db)) > 0;)
      total += n;
    return total;
  }));
  return sent.reduce((a, b) => a + b);
}

await (process.argv[3] === 'listen' ? listen() : serve(drain));
