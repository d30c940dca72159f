package cgroup

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strings"
	"sync"

	"github.com/godbus/dbus/v5"

	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

const (
	systemdName  = "org.freedesktop.systemd1"
	systemdPath  = dbus.ObjectPath("/org/freedesktop/systemd1")
	systemdIface = "org.freedesktop.systemd1.Manager."
	unitExists   = "org.freedesktop.systemd1.UnitExists"
	noSuchUnit   = "org.freedesktop.systemd1.NoSuchUnit"
)

// units are the slices that systemd knows of. Without its knowledge it would
// take the cgroups for its own and change their controllers at the next reload.
type units struct {
	bus     string
	version int

	mu struct {
		sync.Mutex
		conn *dbus.Conn
		jobs map[dbus.ObjectPath]chan string
	}
}

// manager is systemd; the connection is made when it is needed, and again when it broke.
func (u *units) manager(ctx context.Context) (dbus.BusObject, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.mu.conn != nil && u.mu.conn.Connected() {
		return u.mu.conn.Object(systemdName, systemdPath), nil
	}
	var conn *dbus.Conn
	var err error
	if u.bus == "" {
		conn, err = dbus.ConnectSystemBus()
	} else {
		conn, err = dbus.Connect(u.bus)
	}
	if err != nil {
		return nil, fmt.Errorf("systemd is not reached by D-Bus: %w; the driver systemd wants it, or set the runtime to cgroupfs", err)
	}
	signals := make(chan *dbus.Signal, 64)
	conn.Signal(signals)
	m := conn.Object(systemdName, systemdPath)
	err = conn.AddMatchSignalContext(ctx, dbus.WithMatchObjectPath(systemdPath), dbus.WithMatchInterface(strings.TrimSuffix(systemdIface, ".")), dbus.WithMatchMember("JobRemoved"))
	if err == nil {
		err = m.CallWithContext(ctx, systemdIface+"Subscribe", 0).Err
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("subscribe to systemd: %w", err), conn.Close())
	}
	u.mu.conn, u.mu.jobs = conn, map[dbus.ObjectPath]chan string{}
	go u.listen(signals) // until the connection ends, which closes signals
	return m, nil
}

// listen hands out how jobs ended: JobRemoved(id u, job o, unit s, result s).
func (u *units) listen(signals <-chan *dbus.Signal) {
	for s := range signals {
		if s.Name != systemdIface+"JobRemoved" || len(s.Body) != 4 {
			continue
		}
		job, _ := s.Body[1].(dbus.ObjectPath)
		result, _ := s.Body[3].(string)
		u.mu.Lock()
		ch := u.mu.jobs[job]
		delete(u.mu.jobs, job)
		u.mu.Unlock()
		if ch != nil {
			ch <- result
		}
	}
}

// run starts a job and waits for its end. The lock is held while systemd answers,
// so that the job is known before its end is told.
func (u *units) run(ctx context.Context, method string, args ...any) error {
	m, err := u.manager(ctx)
	if err != nil {
		return err
	}
	done := make(chan string, 1)
	var job dbus.ObjectPath
	u.mu.Lock()
	if err = m.CallWithContext(ctx, systemdIface+method, 0, args...).Store(&job); err == nil {
		u.mu.jobs[job] = done
	}
	u.mu.Unlock()
	if err != nil {
		return err
	}
	select {
	case r := <-done:
		if r != "done" {
			return fmt.Errorf("systemd: %s of %v: job ended as %q", method, args[0], r)
		}
		return nil
	case <-ctx.Done():
		u.mu.Lock()
		delete(u.mu.jobs, job)
		u.mu.Unlock()
		return fmt.Errorf("systemd: %s of %v: %w", method, args[0], context.Cause(ctx))
	}
}

type property struct {
	Name  string
	Value dbus.Variant
}

type auxiliary struct {
	Name       string
	Properties []property
}

// start makes the slice; one that is there stays.
func (u *units) start(ctx context.Context, n name) error {
	p := n.path(spec.Systemd)
	unit, parent := filepath.Base(p), filepath.Base(filepath.Dir(p))
	if parent == "/" {
		parent = "-.slice"
	}
	io := "IOAccounting"
	if u.version == 1 {
		io = "BlockIOAccounting"
	}
	props := []property{
		{"Description", dbus.MakeVariant("pods of fairlead-edge: " + unit)},
		{"Wants", dbus.MakeVariant([]string{parent})},
		{"DefaultDependencies", dbus.MakeVariant(false)},
	}
	for _, a := range []string{"MemoryAccounting", "CPUAccounting", io, "TasksAccounting"} {
		props = append(props, property{a, dbus.MakeVariant(true)})
	}
	err := u.run(ctx, "StartTransientUnit", unit, "replace", props, []auxiliary{})
	if isError(err, unitExists) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", unit, err)
	}
	return nil
}

// stop ends the slice; one that is unknown is stopped.
func (u *units) stop(ctx context.Context, unit string) error {
	err := u.run(ctx, "StopUnit", unit, "replace")
	if isError(err, noSuchUnit) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stop %s: %w", unit, err)
	}
	return nil
}

// set tells systemd of the values, so that it writes the same at its next reload.
func (u *units) set(ctx context.Context, n name, r resources) error {
	var props []property
	add := func(k string, v any) { props = append(props, property{k, dbus.MakeVariant(v)}) }
	bound := func(v int64) uint64 {
		if v < 0 {
			return math.MaxUint64
		}
		return uint64(v)
	}
	if r.Shares != 0 {
		if u.version == 2 {
			add("CPUWeight", weight(r.Shares))
		} else {
			add("CPUShares", r.Shares)
		}
	}
	if r.Quota != 0 {
		perSec := uint64(math.MaxUint64)
		if r.Quota > 0 {
			// Systemd counts in whole percents of a CPU, rounded up.
			perSec = uint64(r.Quota) * 1e6 / r.period()
			if rest := perSec % 10_000; rest != 0 {
				perSec += 10_000 - rest
			}
		}
		add("CPUQuotaPerSecUSec", perSec)
		add("CPUQuotaPeriodUSec", r.period())
	}
	if r.Memory != 0 {
		if u.version == 2 {
			add("MemoryMax", bound(r.Memory))
		} else {
			add("MemoryLimit", bound(r.Memory))
		}
	}
	if r.PIDs != 0 {
		add("TasksMax", bound(r.PIDs))
	}
	if len(props) == 0 {
		return nil
	}
	m, err := u.manager(ctx)
	if err != nil {
		return err
	}
	unit := filepath.Base(n.path(spec.Systemd))
	if err := m.CallWithContext(ctx, systemdIface+"SetUnitProperties", 0, unit, true, props).Err; err != nil {
		return fmt.Errorf("set %s: %w", unit, err)
	}
	return nil
}

func (u *units) close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.mu.conn == nil {
		return nil
	}
	err := u.mu.conn.Close()
	u.mu.conn = nil
	return err
}

func isError(err error, name string) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == name
}
