// Another project's client of the Machines API, as it is published, pointed at a server: FLY_API, FLY_TOKEN, FLY_APP.
import assert from 'node:assert/strict';
import client from 'fly-admin/dist/client.js';

const app_name = process.env.FLY_APP;
const fly = new (client.default ?? client)(process.env.FLY_TOKEN, { apiUrl: process.env.FLY_API });
const refused = (promise, status) => assert.rejects(promise, (error) => error.message.startsWith(`${status}:`));

assert.equal((await fly.App.listApps('personal')).total_apps, 1);
assert.equal((await fly.App.getApp(app_name)).name, app_name);

const config = {
  image: 'debian:bookworm',
  init: { exec: ['/bin/sleep', '1000'] },
  guest: { cpu_kind: 'shared', cpus: 1, memory_mb: 256 },
  env: { A: 'b' },
  metadata: { mine: 'yes' },
  restart: { policy: 'no' },
};
const machine = await fly.Machine.createMachine({ app_name, name: 'one', config });
const machine_id = machine.id;
const of = { app_name, machine_id };
const wait = (state, instance_id) =>
  fly.Machine.waitMachine({ ...of, state, timeout: '60s', ...(instance_id && { instance_id }) });
await wait('started', machine.instance_id);
assert.deepEqual((await fly.Machine.listMachines({ app_name, 'metadata.mine': 'yes' })).map(({ id }) => id), [machine_id]);
assert.deepEqual(await fly.Machine.listMachines({ app_name, 'metadata.mine': 'no' }), []);
const seen = await fly.Machine.getMachine(of);
assert.equal(seen.state, 'started');
assert.deepEqual(seen.config, config);
assert.equal((await fly.Machine.listProcesses(of))[0].pid, 1);
assert.equal((await fly.Machine.listEvents(of)).at(-1).type, 'launch');

await fly.Machine.cordonMachine(of);
await fly.Machine.uncordonMachine(of);
const updated = await fly.Machine.updateMachine({ ...of, config: { ...config, env: { A: 'c' } } });
assert.equal(updated.id, machine_id);
assert.notEqual(updated.instance_id, machine.instance_id);
await wait('started', updated.instance_id);
assert.equal((await fly.Machine.listVersions(of)).length, 2);
await fly.Machine.stopMachine({ ...of, timeout: '1s' });
await wait('stopped', updated.instance_id);
await fly.Machine.startMachine(of);
await wait('started', updated.instance_id);
await refused(fly.Machine.createMachine({ app_name, config: { ...config, colour: 'red' } }), 422);
await refused(fly.Machine.getMachine({ app_name, machine_id: '00000000000000' }), 404);

const volume = await fly.Volume.createVolume({ app_name, name: 'data', region: machine.region, size_gb: 1 });
const grown = await fly.Volume.extendVolume({ app_name, volume_id: volume.id, size_gb: 2 });
assert.equal(grown.volume.size_gb, 2);
assert.equal((await fly.Volume.listVolumes(app_name)).length, 1);
await fly.Volume.deleteVolume({ app_name, volume_id: volume.id });

const lease = await fly.Machine.acquireLease({ ...of, ttl: 300 });
assert.equal(lease.status, 'success');
await refused(fly.Machine.stopMachine(of), 409);
await refused(fly.Machine.acquireLease({ ...of, ttl: 300 }), 409);
// The client cannot send a nonce.
const response = await fetch(`${process.env.FLY_API}/v1/apps/${app_name}/machines/${machine_id}/lease`, {
  method: 'DELETE',
  headers: { authorization: `FlyV1 ${process.env.FLY_TOKEN}`, 'fly-machine-lease-nonce': lease.data.nonce },
});
assert.ok(response.ok, await response.text());

await fly.Machine.deleteMachine({ ...of, force: true });
await wait('destroyed');
