package evict

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// alarm wakes the manager when the kernel says so.
type alarm struct {
	file *os.File // becomes readable
	at   int64
	// rang tells whether it rang, and readies it for the next time.
	rang func(fd int) bool
	// trigger is what the file is about, to be closed with it; nil is none.
	trigger *os.File
}

func (a *alarm) close() error {
	if a.trigger == nil {
		return a.file.Close()
	}
	return errors.Join(a.file.Close(), a.trigger.Close())
}

// stale is how far an alarm may be off before it is set anew: the page cache that
// is not counted moves all the time.
const stale = 8 << 20

// arm sets an alarm, unless it is set to about the same. Where the kernel has
// none, the interval has to do.
func (h *Host) arm(s Signal, at int64, open func() (*alarm, error)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old := h.mu.alarms[s]
	if h.mu.broken || old != nil && old.at-stale < at && at < old.at+stale {
		return
	}
	a, err := open()
	if err != nil {
		h.mu.broken = true
		if h.Log != nil {
			h.Log.Info("the kernel gives no alarm when memory runs short; a look every 10 s has to do", "signal", s, "error", err)
		}
		return
	}
	if old != nil {
		_ = old.close()
	}
	if h.mu.alarms == nil {
		h.mu.alarms = map[Signal]*alarm{}
	}
	a.at = at
	h.mu.alarms[s] = a
	h.wait.Go(func() { h.listen(a) })
}

// listen passes alarms on until the file is closed.
func (h *Host) listen(a *alarm) {
	c, err := a.file.SyscallConn()
	if err != nil {
		return
	}
	for c.Read(func(fd uintptr) bool { return a.rang(int(fd)) }) == nil {
		select {
		case h.wake <- struct{}{}:
		default: // it will look anyway
		}
	}
}

// Close ends the alarms.
func (h *Host) Close() error {
	h.mu.Lock()
	var errs []error
	for s, a := range h.mu.alarms {
		errs = append(errs, a.close())
		delete(h.mu.alarms, s)
	}
	h.mu.broken = true // no new ones
	h.mu.Unlock()
	h.wait.Wait()
	return errors.Join(errs...)
}

// usageAlarm tells when a cgroup's usage crosses a value, by version 1.
func usageAlarm(dir string, at int64) (*alarm, error) {
	watched, err := os.Open(filepath.Join(dir, "memory.usage_in_bytes"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = watched.Close() }()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memory alarm")
	line := fmt.Sprintf("%d %d %d", fd, watched.Fd(), at)
	if err := os.WriteFile(filepath.Join(dir, "cgroup.event_control"), []byte(line), 0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &alarm{file: f, rang: func(fd int) bool {
		var b [8]byte
		_, err := unix.Read(fd, b[:])
		return err == nil
	}}, nil
}

// stall is how long tasks may wait for memory within 2 s before the kernel tells,
// in µs. Shorter windows want a capability.
const stall = "some 150000 2000000"

// pressureAlarm tells when tasks wait for memory, which they do shortly before
// there is none (PSI, since Linux 4.20).
func pressureAlarm(file, trigger string) (*alarm, error) {
	fd, err := unix.Open(file, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: file, Err: err}
	}
	f := os.NewFile(uintptr(fd), file)
	if _, err := unix.Write(fd, append([]byte(trigger), 0)); err != nil {
		return nil, errors.Join(&os.PathError{Op: "write", Path: file, Err: err}, f.Close())
	}
	// The trigger raises POLLPRI, which Go's poller does not wait for; an epoll of
	// the trigger is readable then.
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("epoll: %w", err), f.Close())
	}
	err = errors.Join(unix.SetNonblock(ep, true), unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLPRI}))
	// Whoever looks at the trigger takes the event back, and Go's poller has: that it
	// woke is all there is to know.
	woken := true
	a := &alarm{file: os.NewFile(uintptr(ep), "memory pressure"), trigger: f, rang: func(fd int) bool {
		var e [1]unix.EpollEvent
		_, _ = unix.EpollWait(fd, e[:], 0)
		woken = !woken
		return woken
	}}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("epoll of %s: %w", file, err), a.close())
	}
	return a, nil
}
