// What PostgREST (12) does with POST /rpc/FUNCTION, as far as a database and a client
// can see: Debian has no package of it.
//
//	node postgrest.js PORT SCHEMA ANONYMOUS_ROLE
//
// A body of application/json is checked to be JSON and handed over as it came, as the
// one unnamed parameter, cast from an unknown type to json in the statement.  Request
// and role are settings of the transaction; so are status and headers of the answer,
// when the function set them.  pg is found through NODE_PATH, the server by PG*.
'use strict';
const http = require('http');
const { Pool } = require('pg');

const [port, schema, role] = process.argv.slice(2);
const pool = new Pool({ max: 4 });
pool.on('error', () => {});

const identifier = (name) => `"${name.replace(/"/g, '""')}"`;

const settings = `select set_config('search_path', $1, true), set_config('role', $2, true),
  set_config('request.jwt.claims', $3, true), set_config('request.method', $4, true),
  set_config('request.path', $5, true), set_config('request.headers', $6, true),
  set_config('request.cookies', $7, true)`;

const call = (name) => `WITH pgrst_source AS (
    SELECT pgrst_call.pgrst_scalar FROM (SELECT ${identifier(schema)}.${identifier(name)}($1::json) pgrst_scalar) pgrst_call)
  SELECT null::bigint AS total_result_set, 1 AS page_total,
    coalesce(json_agg(_postgrest_t.pgrst_scalar)->0, 'null')::text AS body,
    nullif(current_setting('response.headers', true), '') AS response_headers,
    nullif(current_setting('response.status', true), '') AS response_status
  FROM (SELECT pgrst_source.pgrst_scalar FROM pgrst_source) _postgrest_t`;

async function run(request, body) {
  const path = request.url.split('?')[0];
  const client = await pool.connect();
  let broken;
  try {
    await client.query('BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE');
    await client.query(settings, [`${identifier(schema)}, "public"`, role, JSON.stringify({ role }),
      request.method, path, JSON.stringify(request.headers), '{}']);
    const { rows } = await client.query(call(path.replace(/^\/rpc\//, '')), [body]);
    await client.query('COMMIT');
    return { status: Number(rows[0].response_status || 200), body: rows[0].body };
  } catch (error) {
    broken = await client.query('ROLLBACK').then(() => undefined, (failure) => failure);
    const status = error.code === '42501' ? 401 : error.code && error.code.length === 5 ? 400 : 503;
    return { status, body: JSON.stringify({ code: error.code, message: error.message }) };
  } finally {
    client.release(broken);
  }
}

async function answer(request, body) {
  try {
    JSON.parse(body);
  } catch (error) {
    return { status: 400, body: '{"code":"PGRST102","message":"Empty or invalid json"}' };
  }
  return run(request, body).catch(() => ({ status: 503, body: '{"code":"PGRST001"}' }));
}

http.createServer((request, response) => {
  const chunks = [];
  request.on('data', (chunk) => chunks.push(chunk));
  request.on('end', async () => {
    const { status, body } = await answer(request, Buffer.concat(chunks).toString());
    response.writeHead(status, { 'Content-Type': 'application/json; charset=utf-8', 'Content-Length': Buffer.byteLength(body) });
    response.end(body);
  });
}).listen(port, '127.0.0.1');
