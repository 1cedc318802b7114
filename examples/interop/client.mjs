// A Node client for examples/server. The API key comes from the environment variable API_KEY,
// because an argument would be visible in the process table.
//
//   npm install --no-package-lock --ignore-scripts --no-audit --no-fund
//   API_KEY=oil_… node client.mjs server.pem localhost:50051          # one call
//   API_KEY=oil_… node client.mjs server.pem localhost:50051 watch    # a stream, until the key is revoked
//
// The client prints each event as one line of JSON.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import grpc from '@grpc/grpc-js';
import loader from '@grpc/proto-loader';

const protos = loader.loadSync(
  ['health.proto', 'status.proto'].map((name) => join(import.meta.dirname, name)),
  { enums: String, defaults: true });
const { Health } = grpc.loadPackageDefinition(protos).grpc.health.v1;

const [ca, address, mode = 'check'] = process.argv.slice(2);
if (!address || !['check', 'watch'].includes(mode)) {
  console.error('usage: node client.mjs CA-FILE ADDRESS [watch]');
  process.exit(2);
}

// If there is a key, each call carries the key. grpc-js sends call credentials only over TLS.
let credentials = grpc.credentials.createSsl(readFileSync(ca));
if (process.env.API_KEY) {
  credentials = grpc.credentials.combineChannelCredentials(credentials,
    grpc.credentials.createFromMetadataGenerator((_, callback) => {
      const metadata = new grpc.Metadata();
      metadata.set('authorization', `Bearer ${process.env.API_KEY}`);
      callback(null, metadata);
    }));
}
const client = new Health(address, credentials);

const print = (event, fields) => console.log(JSON.stringify({ event, ...fields }));
const message = ({ status }) => print('message', { status });
const failure = (err) => {
  print('error', { code: err.code, details: err.details, reason: reason(err) });
  process.exitCode = 1;
};

// reason returns the reason from the ErrorInfo in the details of the error.
function reason(err) {
  const [status] = err.metadata?.get('grpc-status-details-bin') ?? [];
  if (!status) return undefined;
  const info = protos['google.rpc.Status'].deserialize(status).details
    .find((detail) => detail.type_url.endsWith('/google.rpc.ErrorInfo'));
  return info && protos['google.rpc.ErrorInfo'].deserialize(info.value).reason;
}

if (mode === 'watch') {
  client.watch({}).on('data', message).on('error', failure).on('end', () => print('end'));
} else {
  client.check({}, { deadline: Date.now() + 10_000 }, (err, reply) => (err ? failure(err) : message(reply)));
}
