package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/broker/store"
	edgeagent "github.com/fairlead-io/fairlead/edge"
)

// agent runs a node's agent on the data folder until stop is called.
func agent(t *testing.T, name, dir string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- edgeagent.Run(ctx, edgeagent.Config{Node: name, Dir: dir, MQTT: []string{"127.0.0.1:0"}, Ready: func([]string) { close(ready) }})
	}()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func ok(t *testing.T, args ...string) (out, errOut string) {
	t.Helper()
	r := fairlead(t, args...)
	if r.err != nil {
		t.Fatalf("%v: %s", args, r)
	}
	return r.out.String(), r.errOut.String()
}

func refused(t *testing.T, want string, args ...string) {
	t.Helper()
	if r := fairlead(t, args...); r.err == nil || !strings.Contains(r.err.Error(), want) {
		t.Errorf("%v: want %q, got %s", args, want, r)
	}
}

// The way of a gateway whose disk dies: backed up while it runs, restored into a
// new folder, and its agent goes on there.
func TestStoreBackupRestore(t *testing.T) {
	dir := t.TempDir()
	agent(t, node, dir)() // what it says of its node is a reading: on the disk when it stops
	stop := agent(t, node, dir)
	file := filepath.Join(t.TempDir(), "plant-7.tar")
	_, said := ok(t, "store", "backup", "--data", dir, file)
	if !strings.Contains(said, "plant-7") || !strings.Contains(said, "verified") {
		t.Errorf("got %s", said)
	}
	refused(t, "no text", "store", "backup", "--data", dir)
	pipe := func() string {
		t.Helper()
		var out, errOut bytes.Buffer
		a := &app{out: &out, errOut: &errOut, now: time.Now}
		if err := a.run(t.Context(), []string{"store", "backup", "--data", dir}); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	piped := pipe()
	if m, err := store.VerifyBackup(strings.NewReader(piped)); err != nil || m.Node != node {
		t.Errorf("got %+v, %v", m, err)
	}
	for _, c := range []string{"check", "dump", "repair"} {
		refused(t, "agent is running", "store", c, "--data", dir)
	}
	refused(t, "not empty", "store", "restore", "--data", dir, file)
	stop()
	offline := pipe()
	if m, err := store.VerifyBackup(strings.NewReader(offline)); err != nil || m.Node != node {
		t.Errorf("got %+v, %v", m, err)
	}
	dumped, _ := ok(t, "store", "dump", "--data", dir, "--prefix", "fl/plant-7/reported/node")

	to := t.TempDir()
	ok(t, "store", "restore", "--data", to, file)
	checked, _ := ok(t, "store", "check", "--data", to)
	if !strings.Contains(checked, "sound") || !strings.Contains(checked, "retained ") {
		t.Errorf("got %s", checked)
	}
	if got, _ := ok(t, "store", "dump", "--data", to, "--space", "retained", "--prefix", "fl/plant-7/reported/node"); got != dumped || !strings.HasPrefix(got, `{"space":"retained","key":"fl/plant-7/reported/node"`) {
		t.Errorf("got %s, want %s", got, dumped)
	}
	agent(t, node, to)()

	// A folder that is another node's takes it not.
	other := t.TempDir()
	agent(t, "other", other)()
	if err := os.RemoveAll(filepath.Join(other, "store")); err != nil {
		t.Fatal(err)
	}
	refused(t, "is the backup of node plant-7", "store", "restore", "--data", other, file)
	cut := filepath.Join(t.TempDir(), "cut.tar")
	if err := os.WriteFile(cut, []byte(piped[:len(piped)/2]), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, "not a whole backup", "store", "restore", "--store", filepath.Join(other, "new"), cut)
	refused(t, "no such file", "store", "backup", "--data", to, filepath.Join(to, "none", "x"))
}

func TestStoreCheckRepair(t *testing.T) {
	dir := t.TempDir()
	agent(t, node, dir)()
	where := filepath.Join(dir, "store")
	manifests, _ := filepath.Glob(filepath.Join(where, "MANIFEST-*"))
	if len(manifests) == 0 {
		t.Fatal("no manifest")
	}
	for _, m := range manifests {
		if err := os.WriteFile(m, bytes.Repeat([]byte("x"), 100), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r := fairlead(t, "store", "check", "--store", where, "-o", "json")
	var rep store.Report
	if r.err == nil || json.Unmarshal(r.out.Bytes(), &rep) != nil || len(rep.Damage) == 0 {
		t.Errorf("got %s", r)
	}
	if r := fairlead(t, "store", "check", "--data", dir); r.err == nil || !strings.Contains(r.out.String(), "DAMAGED  store: ") {
		t.Errorf("got %s", r)
	}
	out, _ := ok(t, "store", "repair", "--data", dir)
	if !strings.Contains(out, "saved from tables and logs: records: ") || !strings.Contains(out, ".damaged-") {
		t.Errorf("got %s", out)
	}
	ok(t, "store", "check", "--data", dir)
	agent(t, node, dir)()
	if left, _ := filepath.Glob(where + ".broken-*"); len(left) > 0 {
		t.Errorf("set aside: %v", left)
	}
}

func TestStoreFlags(t *testing.T) {
	refused(t, "give --data", "store", "check")
	refused(t, "both given", "store", "check", "--data", "a", "--store", "b")
	refused(t, "works on a folder", "store", "check", "--data", "a", "--broker", "mqtt://127.0.0.1:1")
	refused(t, "no store at", "store", "check", "--data", t.TempDir())
	refused(t, "no store at", "store", "backup", "--data", t.TempDir(), filepath.Join(t.TempDir(), "x"))
	refused(t, "no store at", "store", "repair", "--data", t.TempDir())
}
