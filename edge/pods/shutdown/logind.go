package shutdown

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	logindName  = "org.freedesktop.login1"
	logindPath  = dbus.ObjectPath("/org/freedesktop/login1")
	logindIface = "org.freedesktop.login1.Manager"
	systemdName = "org.freedesktop.systemd1"

	logindConf     = "/etc/systemd/logind.conf.d"
	logindConfFile = "99-fairlead-edge.conf"

	reconnectFirst = time.Second
	reconnectMax   = time.Minute

	// reload is how long logind may take to read its configuration.
	reload = 5 * time.Second
)

// Run listens to logind until ctx ends. Without logind, or without periods, it
// only waits; it tells of the former and tries again.
func (m *Manager) Run(ctx context.Context) {
	defer m.kills.Wait()
	if m.total() == 0 {
		<-ctx.Done()
		return
	}
	told := false
	for wait := reconnectFirst; ctx.Err() == nil; wait = min(2*wait, reconnectMax) {
		err := m.listen(ctx, func() { wait, told = reconnectFirst, false })
		if ctx.Err() != nil {
			return
		}
		if !told {
			told = true
			m.log.Warn("no word from logind: pods are not ended in order when the machine goes down; trying again", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// logind is a connection to it.
type logind struct {
	conn    *dbus.Conn
	manager dbus.BusObject
	lock    *os.File // while it is open, logind waits; nil is none
}

// listen serves one connection until it breaks. It calls ready once the lock is held.
func (m *Manager) listen(ctx context.Context, ready func()) (err error) {
	l := &logind{}
	if m.cfg.Bus == "" {
		l.conn, err = dbus.ConnectSystemBus()
	} else {
		l.conn, err = dbus.Connect(m.cfg.Bus)
	}
	if err != nil {
		return fmt.Errorf("connect to D-Bus: %w", err)
	}
	defer func() { err = errors.Join(err, l.release(), l.conn.Close()) }()
	l.manager = l.conn.Object(logindName, logindPath)
	signals := make(chan *dbus.Signal, 8)
	l.conn.Signal(signals)
	if err := l.conn.AddMatchSignalContext(ctx, dbus.WithMatchObjectPath(logindPath), dbus.WithMatchInterface(logindIface), dbus.WithMatchMember("PrepareForShutdown")); err != nil {
		return fmt.Errorf("listen to logind: %w", err)
	}
	if err := m.delay(ctx, l); err != nil {
		return err
	}
	if err := l.inhibit(ctx); err != nil {
		return err
	}
	m.log.Info("pods are ended in order when the machine goes down", "within", m.total())
	ready()
	for {
		select {
		case <-ctx.Done():
			return nil
		case s, ok := <-signals:
			if !ok {
				return errors.New("the connection to D-Bus ended")
			}
			if s.Name != logindIface+".PrepareForShutdown" || len(s.Body) == 0 {
				continue
			}
			switch down, ok := s.Body[0].(bool); {
			case !ok:
				m.log.Warn("logind tells of a shutdown, but not which; left alone", "body", fmt.Sprint(s.Body...))
			case down:
				m.Terminate(ctx)
				if err := l.release(); err != nil {
					return fmt.Errorf("let the machine go down: %w", err)
				}
			default:
				m.set(false)
				if err := l.inhibit(ctx); err != nil {
					return err
				}
			}
		}
	}
}

// inhibitTimeout bounds logind's answer.
const inhibitTimeout = 10 * time.Second

// inhibit takes the lock, unless it is held.
func (l *logind) inhibit(ctx context.Context) error {
	if l.lock != nil {
		return nil
	}
	// The answer is a lock that somebody has to let go, so it is waited for whatever
	// happens.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), inhibitTimeout)
	defer cancel()
	var fd dbus.UnixFD
	err := l.manager.CallWithContext(ctx, logindIface+".Inhibit", 0, "shutdown", "fairlead-edge", "Pods are ended in order", "delay").Store(&fd)
	if err != nil {
		return fmt.Errorf("take logind's inhibitor lock: %w", err)
	}
	l.lock = os.NewFile(uintptr(fd), "inhibitor lock")
	return nil
}

func (l *logind) release() error {
	if l.lock == nil {
		return nil
	}
	err := l.lock.Close()
	l.lock = nil
	return err
}

// longest is how long logind waits for those who hold a lock.
func (l *logind) longest(ctx context.Context) (time.Duration, error) {
	var v dbus.Variant
	err := l.manager.CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, logindIface, "InhibitDelayMaxUSec").Store(&v)
	if err != nil {
		return 0, fmt.Errorf("ask logind how long it waits: %w", err)
	}
	us, ok := v.Value().(uint64)
	if !ok {
		return 0, fmt.Errorf("logind's InhibitDelayMaxUSec is %v, not a number of µs", v)
	}
	return time.Duration(us) * time.Microsecond, nil
}

// delay has logind wait as long as the periods are.
func (m *Manager) delay(ctx context.Context, l *logind) error {
	has, err := l.longest(ctx)
	if err != nil || has >= m.total() {
		return err
	}
	dir := m.cfg.LogindConf
	if dir == "" {
		dir = logindConf
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	file := filepath.Join(dir, logindConfFile)
	text := fmt.Sprintf("# Written by fairlead-edge: its pods may take this long when the machine goes down.\n[Login]\nInhibitDelayMaxSec=%.0f\n", m.total().Seconds())
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return fmt.Errorf("logind waits %s, the shutdown grace periods want %s: %w", has, m.total(), err)
	}
	const sighup = int32(1)
	systemd := l.conn.Object(systemdName, "/org/freedesktop/systemd1")
	if err := systemd.CallWithContext(ctx, systemdName+".Manager.KillUnit", 0, "systemd-logind.service", "all", sighup).Err; err != nil {
		return fmt.Errorf("have logind read %s: %w", file, err)
	}
	for end := time.Now().Add(reload); ; {
		if has, err = l.longest(ctx); err != nil || has >= m.total() {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("logind still waits %s only, the shutdown grace periods want %s: see whether another file overrides InhibitDelayMaxSec of %s", has, m.total(), file)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}
