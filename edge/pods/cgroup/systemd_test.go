package cgroup

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

// bus starts a D-Bus daemon of its own.
func bus(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		t.Skip("no dbus-daemon: install the package dbus-daemon")
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "bus.conf")
	text := fmt.Sprintf(`<busconfig><type>session</type><listen>unix:path=%s/bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_type="*"/><allow eavesdrop="false" receive_type="*"/></policy></busconfig>`, dir)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--nofork", "--print-address", "--config-file="+conf)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	l, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(l)
}

// fakeSystemd answers as systemd does, on a real bus: jobs, and the word of their
// end, which comes before the answer as well as after it.
type fakeSystemd struct {
	conn *dbus.Conn

	sync.Mutex
	units  map[string]map[string]any // properties by unit
	result string                    // how jobs end
	jobs   int
	calls  []string
}

func (f *fakeSystemd) Subscribe() *dbus.Error { return nil }

func (f *fakeSystemd) job(unit string) (dbus.ObjectPath, *dbus.Error) {
	f.jobs++
	path := dbus.ObjectPath(fmt.Sprintf("/org/freedesktop/systemd1/job/%d", f.jobs))
	id, result := uint32(f.jobs), f.result
	end := func() { _ = f.conn.Emit(systemdPath, systemdIface+"JobRemoved", id, path, unit, result) }
	if f.jobs%2 == 0 {
		end()
	} else {
		time.AfterFunc(10*time.Millisecond, end)
	}
	return path, nil
}

func (f *fakeSystemd) StartTransientUnit(unit, mode string, props []property, _ []auxiliary) (dbus.ObjectPath, *dbus.Error) {
	f.Lock()
	defer f.Unlock()
	if f.units[unit] != nil {
		return "", dbus.NewError(unitExists, []any{"Unit " + unit + " already exists."})
	}
	f.calls = append(f.calls, "start "+mode+" "+unit)
	f.units[unit] = map[string]any{}
	for _, p := range props {
		f.units[unit][p.Name] = p.Value.Value()
	}
	return f.job(unit)
}

func (f *fakeSystemd) StopUnit(unit, _ string) (dbus.ObjectPath, *dbus.Error) {
	f.Lock()
	defer f.Unlock()
	if f.units[unit] == nil {
		return "", dbus.NewError(noSuchUnit, []any{"Unit " + unit + " not loaded."})
	}
	f.calls = append(f.calls, "stop "+unit)
	delete(f.units, unit)
	return f.job(unit)
}

func (f *fakeSystemd) SetUnitProperties(unit string, runtime bool, props []property) *dbus.Error {
	f.Lock()
	defer f.Unlock()
	if f.units[unit] == nil || !runtime {
		return dbus.NewError(noSuchUnit, nil)
	}
	for _, p := range props {
		f.units[unit][p.Name] = p.Value.Value()
	}
	return nil
}

func TestSystemd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("cgroups want root")
	}
	addr := bus(t)
	conn, err := dbus.Connect(addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	f := &fakeSystemd{conn: conn, units: map[string]map[string]any{}, result: "done"}
	if err := conn.Export(f, systemdPath, strings.TrimSuffix(systemdIface, ".")); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestName(systemdName, dbus.NameFlagDoNotQueue); err != nil {
		t.Fatal(err)
	}
	root := "fairlead-test-" + strings.ToLower(rand.Text()[:8])
	esc := strings.ReplaceAll(root, "-", "_")
	cfg := Config{Driver: spec.Systemd, Root: root, Bus: addr}
	tree, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if tree.Version() != 1 {
		t.Skip("the test's values are those of version 1")
	}
	defer func() { _ = tree.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	const uid = types.UID("12ab-34")
	setup := func(tree *Tree) error {
		return errors.Join(tree.Setup(ctx, Limits{MilliCPU: 2000, Memory: 1 << 30}),
			tree.EnsurePod(ctx, uid, corev1.PodQOSBurstable, spec.PodCgroup{CPUShares: 512, CPUQuota: new(int64(12_345)), CPUPeriod: new(uint64(100_000)), Memory: new(int64(64 << 20)), PIDs: new(int64(10))}))
	}
	defer func() {
		if err := tree.Remove(ctx); err != nil {
			t.Error(err)
		}
	}()
	if err := setup(tree); err != nil {
		t.Fatal(err)
	}
	pod := esc + "-kubepods-burstable-pod12ab_34.slice"
	want := []string{
		"start replace " + esc + ".slice", "start replace " + esc + "-kubepods.slice", "start replace " + esc + "-kubepods-burstable.slice",
		"start replace " + esc + "-kubepods-besteffort.slice", "start replace " + pod,
	}
	f.Lock()
	if !slices.Equal(f.calls, want) {
		t.Errorf("systemd was asked\n%s\nwant\n%s", strings.Join(f.calls, "\n"), strings.Join(want, "\n"))
	}
	for k, v := range map[string]any{
		"Wants": []string{esc + "-kubepods-burstable.slice"}, "DefaultDependencies": false, "MemoryAccounting": true, "BlockIOAccounting": true,
		"CPUShares": uint64(512), "CPUQuotaPerSecUSec": uint64(130_000), "CPUQuotaPeriodUSec": uint64(100_000), "MemoryLimit": uint64(64 << 20), "TasksMax": uint64(10),
	} {
		if got := f.units[pod][k]; fmt.Sprint(got) != fmt.Sprint(v) {
			t.Errorf("%s of the pod: %v, want %v", k, got, v)
		}
	}
	f.Unlock()
	if got := read(t, tree, "cpu", tree.pod(uid, corev1.PodQOSBurstable), "cpu.cfs_quota_us"); got != "12345" {
		t.Errorf("quota in the kernel: %s", got)
	}
	if found, err := tree.Pods(); err != nil || found[uid] != corev1.PodQOSBurstable {
		t.Errorf("found %v, %v", found, err)
	}

	// An agent that starts anew finds its slices.
	again, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Close() }()
	if err := setup(again); err != nil {
		t.Errorf("again: %v", err)
	}
	f.Lock()
	if len(f.calls) != len(want) {
		t.Errorf("again, systemd was asked %v", f.calls)
	}
	f.Unlock()
	for range 2 {
		if err := again.RemovePod(ctx, uid); err != nil {
			t.Fatal(err)
		}
	}
	f.Lock()
	if f.units[pod] != nil {
		t.Error("the pod's slice is left")
	}
	f.Unlock()
	if found, err := again.Pods(); err != nil || len(found) != 0 {
		t.Errorf("found %v, %v", found, err)
	}

	// A cgroup that systemd knows nothing of, as after a kill -9.
	dir, _ := tree.dir("memory", tree.pod("56cd", corev1.PodQOSBestEffort))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := again.RemovePod(ctx, "56cd"); err != nil || exists(dir) {
		t.Errorf("a cgroup without a slice: %v", err)
	}

	f.Lock()
	f.result = "failed"
	f.Unlock()
	if err := again.EnsurePod(ctx, uid, corev1.PodQOSBurstable, spec.PodCgroup{}); err == nil || !strings.Contains(err.Error(), pod) || !strings.Contains(err.Error(), `"failed"`) {
		t.Errorf("a job that fails: %v", err)
	}
	f.Lock()
	f.result = "done"
	f.Unlock()

	alone, err := Open(Config{Driver: spec.Systemd, Bus: "unix:path=" + filepath.Join(t.TempDir(), "none")})
	if err != nil {
		t.Fatal(err)
	}
	if err := alone.Setup(ctx, Limits{}); err == nil || !strings.Contains(err.Error(), "cgroupfs") {
		t.Errorf("without systemd: %v", err)
	}
}
