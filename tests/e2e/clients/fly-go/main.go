// Fly's own Go client of the Machines API, as it is published, pointed at a server: FLY_FLAPS_BASE_URL, FLY_TOKEN, FLY_EDGE.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"reflect"
	"time"

	fly "github.com/superfly/fly-go"
	"github.com/superfly/fly-go/flaps"
	"github.com/superfly/fly-go/tokens"
)

var failed bool

func main() {
	log.SetFlags(log.Lshortfile)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	// Where names below localhost lead nowhere, they lead here.
	here := &http.Transport{DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, os.Getenv("FLY_EDGE"))
	}}
	client, err := flaps.NewWithOptions(ctx, flaps.NewClientOpts{Tokens: tokens.Parse(os.Getenv("FLY_TOKEN")), Transport: here})
	must(err)
	regions, err := client.GetRegions(ctx)
	must(err)
	is(len(regions.Regions), 1)
	is(regions.Nearest, regions.Regions[0].Code)
	apps(ctx, client)
	machines(ctx, client)
	leases(ctx, client)
	volumes(ctx, client, regions.Nearest)
	secrets(ctx, client)
	must(client.DeleteApp(ctx, "gofly"))
	refused(client.DeleteApp(ctx, "gofly"), 404)
	if failed {
		os.Exit(1)
	}
}

func apps(ctx context.Context, client *flaps.Client) {
	made, err := client.CreateApp(ctx, flaps.CreateAppRequest{Name: "gofly", Org: "personal"})
	must(err)
	is(made.Name, "gofly")
	must(client.WaitForApp(ctx, "gofly"))
	app, err := client.GetApp(ctx, "gofly")
	must(err)
	is(app.Organization.Slug, "personal")
	is(app.Status, "pending")
	is(app.Deployed(), false)
	all, err := client.ListApps(ctx, flaps.ListAppsRequest{OrgSlug: "personal"})
	must(err)
	is(len(all), 1)
	_, err = client.GetApp(ctx, "nobody")
	refused(err, 404)
	_, err = client.CreateApp(ctx, flaps.CreateAppRequest{Name: "gofly", Org: "personal"})
	refused(err, 409)
	_, err = client.CreateApp(ctx, flaps.CreateAppRequest{Name: "Not a name", Org: "personal"})
	refused(err, 422)
}

func config(env string) *fly.MachineConfig {
	yes, stop := true, fly.MachineAutostopStop
	port, timeout := 8080, &fly.Duration{Duration: 2 * time.Second}
	return &fly.MachineConfig{
		Image:    "debian:bookworm",
		Env:      map[string]string{"A": env},
		Init:     fly.MachineInit{Exec: []string{"/bin/sleep", "1000"}},
		Guest:    &fly.MachineGuest{CPUKind: "shared", CPUs: 1, MemoryMB: 256},
		Metadata: map[string]string{fly.MachineConfigMetadataKeyFlyPlatformVersion: "v2", fly.MachineConfigMetadataKeyFlyProcessGroup: "app"},
		Restart:  &fly.MachineRestart{Policy: fly.MachineRestartPolicyOnFailure, MaxRetries: 3},
		Services: []fly.MachineService{{
			Protocol: "tcp", InternalPort: 8080, Autostart: &yes, Autostop: &stop,
			Ports:       []fly.MachinePort{{Port: fly.IntPointer(80), Handlers: []string{"http"}}, {Port: fly.IntPointer(443), Handlers: []string{"tls", "http"}}},
			Concurrency: &fly.MachineServiceConcurrency{Type: "requests", SoftLimit: 20, HardLimit: 40},
		}},
		Checks:     map[string]fly.MachineCheck{"alive": {Type: fly.Pointer("tcp"), Port: &port, Interval: timeout, Timeout: timeout}},
		StopConfig: &fly.StopConfig{Signal: fly.Pointer("SIGTERM"), Timeout: timeout},
	}
}

func machines(ctx context.Context, client *flaps.Client) {
	made, err := client.Launch(ctx, "gofly", fly.LaunchMachineInput{Name: "one", Config: config("b")})
	must(err)
	id := made.ID
	must(client.Wait(ctx, "gofly", made, "started", time.Minute))
	machine := get(ctx, client, id)
	is(machine.State, "started")
	is(machine.Name, "one")
	is(machine.HostStatus, fly.HostStatusOk)
	is(machine.InstanceID, made.InstanceID)
	is(machine.Config.Env, map[string]string{"A": "b"})
	is(machine.Config.Guest.MemoryMB, 256)
	is(machine.Config.Services[0].Concurrency.HardLimit, 40)
	is(*machine.Config.Services[0].Autostop, fly.MachineAutostopStop)
	is(machine.IsFlyAppsPlatform(), true)
	is(machine.ProcessGroup(), "app")
	is(machine.TopLevelChecks().Total, 1)
	if machine.ImageRef.Digest == "" || net.ParseIP(machine.PrivateIP) == nil || machine.GetLatestEventOfType("launch") == nil {
		log.Fatalf("%+v", machine)
	}
	runs(ctx, client, id)

	all, err := client.List(ctx, "gofly", "")
	must(err)
	is(len(all), 1)
	active, err := client.ListActive(ctx, "gofly")
	must(err)
	is(len(active), 1)
	ours, _, err := client.ListFlyAppsMachines(ctx, "gofly")
	must(err)
	is(len(ours), 1)

	ran, err := client.Exec(ctx, "gofly", id, &fly.MachineExecRequest{Cmd: `sh -c "cat; echo $A; echo no >&2; exit 3"`, Stdin: "in ", Timeout: 10})
	must(err)
	is(*ran, fly.MachineExecResponse{ExitCode: 3, StdOut: "in b\n", StdErr: "no\n"})
	processes, err := client.GetProcesses(ctx, "gofly", id)
	must(err)
	is(processes[0].Pid, int32(1))

	must(client.SetMetadata(ctx, "gofly", id, "mine", "yes"))
	metadata, err := client.GetMetadata(ctx, "gofly", id)
	must(err)
	is(metadata["mine"], "yes")
	must(client.DeleteMetadata(ctx, "gofly", id, "mine"))
	metadata, err = client.GetMetadata(ctx, "gofly", id)
	must(err)
	is(metadata["mine"], "")
	must(client.Cordon(ctx, "gofly", id, ""))
	must(client.Uncordon(ctx, "gofly", id, ""))

	updated, err := client.Update(ctx, "gofly", fly.LaunchMachineInput{ID: id, Name: "one", Region: machine.Region, Config: config("c")}, "")
	must(err)
	is(updated.ID, id)
	is(updated.InstanceID != made.InstanceID, true)
	must(client.Wait(ctx, "gofly", updated, "started", time.Minute))
	runs(ctx, client, id)
	is(get(ctx, client, id).Config.Env["A"], "c")
	// What a client read it may send back.
	same := get(ctx, client, id)
	again, err := client.Update(ctx, "gofly", fly.LaunchMachineInput{ID: id, Region: same.Region, Config: same.Config}, "")
	must(err)
	must(client.Wait(ctx, "gofly", again, "started", time.Minute))

	// One that runs and is not to be launched rests.
	resting, err := client.Update(ctx, "gofly", fly.LaunchMachineInput{ID: id, Region: same.Region, Config: same.Config, SkipLaunch: true}, "")
	must(err)
	must(client.Wait(ctx, "gofly", resting, "stopped", time.Minute))
	again, err = client.Update(ctx, "gofly", fly.LaunchMachineInput{ID: id, Region: same.Region, Config: same.Config}, "")
	must(err)
	must(client.Wait(ctx, "gofly", again, "started", time.Minute))

	must(client.Suspend(ctx, "gofly", id, ""))
	must(client.Wait(ctx, "gofly", again, "suspended", time.Minute))
	started, err := client.Start(ctx, "gofly", id, "")
	must(err)
	is(started.PreviousState, "suspended")
	must(client.Wait(ctx, "gofly", again, "started", time.Minute))
	must(client.Stop(ctx, "gofly", fly.StopMachineInput{ID: id, Signal: "SIGKILL", Timeout: fly.Duration{Duration: time.Second}}, ""))
	must(client.Wait(ctx, "gofly", again, "stopped", time.Minute))
	exit := get(ctx, client, id).GetLatestEventOfType("exit")
	is(exit.Request.ExitEvent.RequestedStop, true)
	is(exit.Request.ExitEvent.Signal, 9)
	is(exit.Request.ExitEvent.Restarting, false)
	code, err := exit.Request.GetExitCode()
	must(err)
	is(code, 137)
	_, err = client.Start(ctx, "gofly", id, "")
	must(err)
	must(client.Wait(ctx, "gofly", again, "started", time.Minute))
	must(client.Restart(ctx, "gofly", fly.RestartMachineInput{ID: id, ForceStop: true, Timeout: 5 * time.Second, Signal: "SIGUSR1"}, ""))
	must(client.Wait(ctx, "gofly", again, "started", time.Minute))
	last := get(ctx, client, id).Events[:2]
	is([]string{last[0].Type, last[1].Type}, []string{"start", "exit"})
	is(get(ctx, client, id).GetLatestEventOfType("exit").Request.ExitEvent.RequestedStop, true)
	must(client.Kill(ctx, "gofly", id))
	crashes(ctx, client)

	bad := config("d")
	bad.Guest.CPUKind = "borrowed"
	_, err = client.Launch(ctx, "gofly", fly.LaunchMachineInput{Config: bad})
	refused(err, 422)
	_, err = client.Get(ctx, "gofly", "00000000000000")
	refused(err, 404)
	_, err = client.Launch(ctx, "gofly", fly.LaunchMachineInput{Config: config("d"), Region: "nowhere"})
	refused(err, 422)
	huge := config("d")
	huge.Guest.MemoryMB = 64 * 1024
	_, err = client.Launch(ctx, "gofly", fly.LaunchMachineInput{Config: huge})
	lacks := refused(err, 503)
	is(lacks.Suggestion(), "Try choosing a different region for machine creation")

	asleep, err := client.Launch(ctx, "gofly", fly.LaunchMachineInput{Config: config("e"), SkipLaunch: true, SkipServiceRegistration: true, LeaseTTL: 30})
	must(err)
	is(asleep.LeaseNonce != "", true)
	refused(client.Destroy(ctx, "gofly", fly.RemoveMachineInput{ID: asleep.ID, Kill: true}, ""), 409)
	must(client.Destroy(ctx, "gofly", fly.RemoveMachineInput{ID: asleep.ID, Kill: true}, asleep.LeaseNonce))
	must(client.Wait(ctx, "gofly", asleep, "destroyed", time.Minute))
	is(get(ctx, client, asleep.ID).IsActive(), false)
}

// By its events it was started after its last exit, which flyctl waits for.
func runs(ctx context.Context, client *flaps.Client, id string) {
	if _, err := get(ctx, client, id).MostRecentStartTimeAfterLaunch(); err != nil {
		log.Output(2, err.Error())
		failed = true
	}
}

// What flyctl asks of a machine that it has deployed: whether it does nothing but crash.
func crashes(ctx context.Context, client *flaps.Client) {
	bad := config("x")
	bad.Services, bad.Checks = nil, nil
	bad.Init.Exec = []string{"/bin/sh", "-c", "exit 3"}
	bad.Restart = &fly.MachineRestart{Policy: fly.MachineRestartPolicyAlways}
	made, err := client.Launch(ctx, "gofly", fly.LaunchMachineInput{Config: bad})
	must(err)
	for {
		exit := get(ctx, client, made.ID).GetLatestEventOfType("exit")
		if exit != nil && exit.Request.RestartCount > 1 {
			is(exit.Request.ExitEvent.Restarting, true)
			is(exit.Request.ExitEvent.RequestedStop, false)
			code, err := exit.Request.GetExitCode()
			must(err)
			is(code, 3)
			break
		}
		must(ctx.Err())
		time.Sleep(100 * time.Millisecond)
	}
	must(client.Destroy(ctx, "gofly", fly.RemoveMachineInput{ID: made.ID, Kill: true}, ""))
}

func leases(ctx context.Context, client *flaps.Client) {
	all, err := client.ListActive(ctx, "gofly")
	must(err)
	id := all[0].ID
	_, err = client.FindLease(ctx, "gofly", id)
	refused(err, 404)
	ttl := 60
	lease, err := client.AcquireLease(ctx, "gofly", id, &ttl)
	must(err)
	is(lease.Status, "success")
	_, err = client.AcquireLease(ctx, "gofly", id, &ttl)
	refused(err, 409)
	found, err := client.FindLease(ctx, "gofly", id)
	must(err)
	is(found.Data.Owner, lease.Data.Owner)
	longer, err := client.RefreshLease(ctx, "gofly", id, fly.IntPointer(120), lease.Data.Nonce)
	must(err)
	is(longer.Data.Nonce, lease.Data.Nonce)
	is(longer.Data.ExpiresAt > lease.Data.ExpiresAt, true)
	refused(client.Cordon(ctx, "gofly", id, ""), 409)
	must(client.Cordon(ctx, "gofly", id, lease.Data.Nonce))
	must(client.Uncordon(ctx, "gofly", id, lease.Data.Nonce))
	refused(client.ReleaseLease(ctx, "gofly", id, ""), 400)
	must(client.ReleaseLease(ctx, "gofly", id, lease.Data.Nonce))
}

func volumes(ctx context.Context, client *flaps.Client, region string) {
	made, err := client.CreateVolume(ctx, "gofly", fly.CreateVolumeRequest{Name: "data", Region: region, SizeGb: fly.IntPointer(1), SnapshotRetention: fly.IntPointer(7)})
	must(err)
	is(made.SizeGb, 1)
	is(made.IsAttached(), false)
	with := config("v")
	with.Mounts = []fly.MachineMount{{Volume: made.ID, Path: "/data"}}
	machine, err := client.Launch(ctx, "gofly", fly.LaunchMachineInput{Config: with})
	must(err)
	must(client.Wait(ctx, "gofly", machine, "started", time.Minute))
	seen, err := client.GetVolume(ctx, "gofly", made.ID)
	must(err)
	is(*seen.AttachedMachine, machine.ID)
	refused(second(client.DeleteVolume(ctx, "gofly", made.ID)), 412)
	grown, _, err := client.ExtendVolume(ctx, "gofly", made.ID, 2)
	must(err)
	is(grown.SizeGb, 2)
	must(client.CreateVolumeSnapshot(ctx, "gofly", made.ID))
	snapshots, err := client.GetVolumeSnapshots(ctx, "gofly", made.ID)
	must(err)
	is(len(snapshots), 1)
	must(client.Destroy(ctx, "gofly", fly.RemoveMachineInput{ID: machine.ID, Kill: true}, ""))
	must(client.Wait(ctx, "gofly", machine, "destroyed", time.Minute))
	kept, err := client.UpdateVolume(ctx, "gofly", made.ID, fly.UpdateVolumeRequest{SnapshotRetention: fly.IntPointer(9)})
	must(err)
	is(kept.SnapshotRetention, 9)
	_, err = client.DeleteVolume(ctx, "gofly", made.ID)
	must(err)
	left, err := client.GetVolumes(ctx, "gofly")
	must(err)
	is(len(left), 0)
}

func secrets(ctx context.Context, client *flaps.Client) {
	set, err := client.SetAppSecret(ctx, "gofly", "KEY", "value")
	must(err)
	is(set.Name, "KEY")
	one, err := client.GetAppSecrets(ctx, "gofly", "KEY", nil, false)
	must(err)
	is(one.Digest, set.Digest)
	updated, err := client.UpdateAppSecrets(ctx, "gofly", map[string]*string{"OTHER": fly.Pointer("x"), "KEY": nil})
	must(err)
	is(updated.Version > set.Version, true)
	all, err := client.ListAppSecrets(ctx, "gofly", nil, false)
	must(err)
	is(len(all), 1)
	is(all[0].Name, "OTHER")
	gone, err := client.DeleteAppSecret(ctx, "gofly", "OTHER")
	must(err)
	is(gone.Version > updated.Version, true)
	_, err = client.GetAppSecrets(ctx, "gofly", "OTHER", nil, false)
	refused(err, 404)
}

func get(ctx context.Context, client *flaps.Client, id string) *fly.Machine {
	machine, err := client.Get(ctx, "gofly", id)
	must(err)
	return machine
}

func second[T any](_ T, err error) error { return err }

func must(err error) {
	if err != nil {
		log.Output(2, err.Error())
		os.Exit(1)
	}
}

func is[T any](seen, wanted T) {
	if !reflect.DeepEqual(seen, wanted) {
		log.Output(2, fmt.Sprintf("%v, not %v", seen, wanted))
		failed = true
	}
}

// The API's refusal, with this status.
func refused(err error, code int) flaps.FlapsError {
	var refusal *flaps.FlapsError
	if !errors.As(err, &refusal) {
		log.Output(2, fmt.Sprintf("not refused: %v", err))
		failed = true
		return flaps.FlapsError{}
	}
	if refusal.ResponseStatusCode != code || refusal.FlyRequestId == "" {
		log.Output(2, fmt.Sprintf("%d, not %d: %s (request %q)", refusal.ResponseStatusCode, code, refusal.ResponseBody, refusal.FlyRequestId))
		failed = true
	}
	return *refusal
}
