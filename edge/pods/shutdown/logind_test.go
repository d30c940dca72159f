package shutdown

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	corev1 "k8s.io/api/core/v1"
)

// bus starts a D-Bus daemon of its own.
func bus(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		t.Skip("no dbus-daemon: install the package dbus-daemon")
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "bus.conf")
	text := fmt.Sprintf(`<busconfig><type>system</type><listen>unix:path=%s/bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_type="*"/><allow eavesdrop="false" receive_type="*"/></policy></busconfig>`, dir)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--nofork", "--print-address", "--config-file="+conf)
	cmd.Stderr = os.Stderr
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

// fakeLogind answers as logind and systemd do, on a real bus: a lock is one end of
// a pipe, whose other end tells when it was let go.
type fakeLogind struct {
	t     *testing.T
	conn  *dbus.Conn
	conf  string // what a reload reads
	delay uint64
	locks chan *os.File
}

func logindOn(t *testing.T, addr, conf string, delay time.Duration) *fakeLogind {
	t.Helper()
	conn, err := dbus.Connect(addr)
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeLogind{t: t, conn: conn, conf: conf, delay: uint64(delay.Microseconds()), locks: make(chan *os.File, 4)}
	for _, e := range []struct {
		path, iface string
		v           any
	}{
		{"/org/freedesktop/login1", "org.freedesktop.login1.Manager", f},
		{"/org/freedesktop/login1", "org.freedesktop.DBus.Properties", f},
		{"/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", f},
	} {
		if err := conn.Export(e.v, dbus.ObjectPath(e.path), e.iface); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []string{"org.freedesktop.login1", "org.freedesktop.systemd1"} {
		if r, err := conn.RequestName(n, dbus.NameFlagDoNotQueue); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
			t.Fatal(r, err)
		}
	}
	t.Cleanup(func() { _ = conn.Close() })
	return f
}

func (f *fakeLogind) Get(_, property string) (dbus.Variant, *dbus.Error) {
	if property != "InhibitDelayMaxUSec" {
		return dbus.Variant{}, dbus.NewError("org.freedesktop.DBus.Error.UnknownProperty", nil)
	}
	return dbus.MakeVariant(f.delay), nil
}

func (f *fakeLogind) Inhibit(what, who, _, mode string) (dbus.UnixFD, *dbus.Error) {
	if what != "shutdown" || who != "fairlead-edge" || mode != "delay" {
		return 0, dbus.NewError("org.freedesktop.DBus.Error.InvalidArgs", nil)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return 0, dbus.MakeFailedError(err)
	}
	fd := dbus.UnixFD(w.Fd())
	// The daemon has its own copy once the reply is out; ours must go, else nobody
	// sees the lock go.
	time.AfterFunc(500*time.Millisecond, func() { _ = w.Close() })
	f.locks <- r
	return fd, nil
}

func (f *fakeLogind) KillUnit(unit, _ string, signal int32) *dbus.Error {
	if unit != "systemd-logind.service" || signal != 1 {
		return dbus.NewError("org.freedesktop.DBus.Error.InvalidArgs", nil)
	}
	b, err := os.ReadFile(f.conf)
	if err != nil {
		return dbus.MakeFailedError(err)
	}
	for l := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(l), "InhibitDelayMaxSec="); ok {
			d, err := time.ParseDuration(v + "s")
			if err != nil {
				return dbus.MakeFailedError(err)
			}
			f.delay = uint64(d.Microseconds())
		}
	}
	return nil
}

func (f *fakeLogind) prepare(down bool) {
	f.t.Helper()
	if err := f.conn.Emit("/org/freedesktop/login1", "org.freedesktop.login1.Manager.PrepareForShutdown", down); err != nil {
		f.t.Fatal(err)
	}
}

// released waits until the lock is let go.
func released(t *testing.T, lock *os.File) {
	t.Helper()
	_ = lock.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := lock.Read(make([]byte, 1)); n != 0 || os.IsTimeout(err) {
		t.Fatalf("the lock was not let go: %v", err)
	}
	_ = lock.Close()
}

func next[T any](t *testing.T, ch <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(20 * time.Second):
		t.Fatalf("no %s", what)
		panic("unreachable")
	}
}

func TestLogind(t *testing.T) {
	addr, dir := bus(t), t.TempDir()
	conf := filepath.Join(dir, "conf.d", logindConfFile)
	kills, changed := make(chan Termination), make(chan struct{}, 4)
	events := make(chan string, 4)
	m := New(Config{
		Periods: periods(t, 30*time.Second, 10*time.Second), Bus: addr, LogindConf: filepath.Dir(conf),
		Pods: func() []*corev1.Pod { return []*corev1.Pod{mkpod("dns", 2_000_000_000, 60), mkpod("app", 0, 60)} },
		Kill: func(_ context.Context, k Termination) error { kills <- k; return nil },
		Event: func(_, reason, message string) {
			events <- reason + ": " + message
		},
		Changed: func() { changed <- struct{}{} },
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); m.Run(ctx) }()
	defer func() { cancel(); <-done }()

	// The agent may start before logind does. It tells logind to wait long enough.
	f := logindOn(t, addr, conf, 5*time.Second)
	lock := next(t, f.locks, "inhibitor lock")
	if f.delay != 30_000_000 {
		t.Errorf("logind waits %d µs", f.delay)
	}
	if m.ShuttingDown() {
		t.Error("shutting down at the start")
	}
	if r, _ := m.Admit(); r != "" {
		t.Errorf("pods are refused: %s", r)
	}

	f.prepare(true)
	next(t, changed, "word of the shutdown")
	if e := next(t, events, "event"); e != "Shutdown: Shutdown manager detected shutdown event" {
		t.Error(e)
	}
	if r, msg := m.Admit(); r != "NodeShutdown" || msg != "Pod was rejected as the node is shutting down." {
		t.Errorf("admission: %q %q", r, msg)
	}
	if k := next(t, kills, "kill"); k.Pod.Name != "app" || k.Grace != 20 {
		t.Errorf("first %s with %d s", k.Pod.Name, k.Grace)
	}
	// Held until the last pod has ended.
	_ = lock.SetReadDeadline(time.Now().Add(time.Second))
	if _, err := lock.Read(make([]byte, 1)); !os.IsTimeout(err) {
		t.Errorf("the lock was let go before the critical pod ended: %v", err)
	}
	if k := next(t, kills, "kill"); k.Pod.Name != "dns" || k.Grace != 10 {
		t.Errorf("then %s with %d s", k.Pod.Name, k.Grace)
	}
	released(t, lock)

	f.prepare(false) // somebody has cancelled it
	lock = next(t, f.locks, "inhibitor lock after the cancellation")
	next(t, changed, "word of the cancellation")
	if m.ShuttingDown() {
		t.Error("still shutting down")
	}

	// Ending the agent lets the lock go: a machine must not wait for it.
	cancel()
	<-done
	released(t, lock)
}

func TestNoPeriods(t *testing.T) {
	m := New(Config{Bus: "unix:path=/nonexistent"})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	m.Run(ctx)
}
