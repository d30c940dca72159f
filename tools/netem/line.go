package netem

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrUnavailable is wrapped by the error of [Open] where the machine or the
// user's rights do not allow for a line.
var ErrUnavailable = errors.New("no emulated line on this machine")

// Path is how one direction of a line behaves. The zero value is a perfect one.
type Path struct {
	// Delay is what each packet takes, give or take Jitter (evenly spread).
	// Jitter alone keeps the order.
	Delay, Jitter time.Duration
	// Loss, Duplicate and Reorder are probabilities per packet, 0 to 1. A
	// duplicate takes its own time. A reordered packet takes none, and so
	// overtakes those under way.
	Loss, Duplicate, Reorder float64
	// Cut drops everything, what is under way included. Nobody is told.
	Cut bool
}

// Conditions are a line's.
type Conditions struct {
	Up, Down Path // from the node to the host, and back
	// FlowBytes ends each TCP connection with RST, as [Line.Reset] does, once it
	// has carried this many bytes of packets in both directions; 0 never does.
	FlowBytes int64
}

// Both gives the conditions of a line that is the same in both directions.
func Both(p Path) Conditions { return Conditions{Up: p, Down: p} }

// PathStats counts the IPv4 packets of one direction since the line was opened.
type PathStats struct {
	Packets, Bytes         int64 // delivered, duplicates included; bytes with IP headers
	Lost, Cut, Overflowed  int64 // dropped: by Loss, by Cut or Reset, and over the queue's bound
	Duplicated, Overtaking int64 // by Duplicate and Reorder
}

// Stats counts what a line did.
type Stats struct {
	Up, Down PathStats
	Resets   int64 // TCP connections ended
}

// Line is a namespace and its only way out. All methods may be called from any
// goroutine.
type Line struct {
	// Host and Node are the addresses of both ends. From the namespace all other
	// lines' hosts can be reached too: they are the same host.
	Host, Node netip.Addr

	ns       int // a descriptor of the namespace
	up, down *path
	wg       sync.WaitGroup
	done     chan struct{}
	close    func() error

	mu struct {
		sync.Mutex
		rng        *rand.Rand
		conditions Conditions
		flows      map[flowKey]*flow // bounded by the ports of the node's one address
		resets     int64
	}
}

// Open makes a namespace and joins it to the host's with a perfect line. The
// seed is that of what is left to chance.
func Open(seed uint64) (*Line, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("%w: it takes root", ErrUnavailable)
	}
	l := &Line{done: make(chan struct{})}
	l.mu.rng = rand.New(rand.NewPCG(seed, 0))
	l.mu.flows = map[flowKey]*flow{}
	var err error
	if l.ns, err = newNamespace(); err != nil {
		return nil, err
	}
	host, n, err := hostEnd()
	if err != nil {
		return nil, errors.Join(err, unix.Close(l.ns))
	}
	l.Host, l.Node = addr(n, 1), addr(n, 2)
	var node *os.File
	err = l.Do(func() error {
		if err := ifup("lo", netip.Addr{}, 0); err != nil {
			return err
		}
		var err error
		if node, err = tun(deviceName(n)); err != nil {
			return err
		}
		// The whole range lies behind it: any line's host is reached this way.
		return ifup(deviceName(n), l.Node, prefix.Bits())
	})
	if err != nil {
		if node != nil {
			_ = node.Close()
		}
		return nil, errors.Join(err, host.Close(), unix.Close(l.ns))
	}
	l.up, l.down = newPath(l, node, host), newPath(l, host, node)
	l.close = sync.OnceValue(func() error {
		close(l.done)
		err := errors.Join(node.Close(), host.Close())
		l.wg.Wait()
		return errors.Join(err, unix.Close(l.ns))
	})
	for _, p := range []*path{l.up, l.down} {
		l.wg.Go(p.read)
		l.wg.Go(p.deliver)
	}
	return l, nil
}

// Close takes the line away. Processes in the namespace live on without one.
func (l *Line) Close() error { return l.close() }

// Set changes the conditions. Packets that are under way keep their time, and
// hold up those behind them, unless they are cut.
func (l *Line) Set(c Conditions) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.conditions = c
	for _, p := range []*path{l.up, l.down} {
		if p.conditionsLocked().Cut {
			p.stats.Cut += int64(len(p.queue))
			p.queue, p.last = nil, time.Time{}
		}
	}
}

// Stats gives the counts.
func (l *Line) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{Up: l.up.stats, Down: l.down.stats, Resets: l.mu.resets}
}

// Enter moves the calling thread into the namespace; see [runtime.LockOSThread].
// A process that this thread starts is in it.
func (l *Line) Enter() error {
	if err := unix.Setns(l.ns, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the network namespace: %w", err)
	}
	return nil
}

// Do calls f in the namespace, on a thread that is not used for anything else.
// Goroutines that f starts are not in it, the processes and sockets are.
func (l *Line) Do(f func() error) error {
	return onThread(func() error {
		if err := l.Enter(); err != nil {
			return err
		}
		return f()
	})
}

// onThread calls f on a thread that ends with it, whatever f made of it.
func onThread(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and no unlock: the thread ends with the goroutine
		result <- f()
	}()
	return <-result
}

func newNamespace() (fd int, err error) {
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("%w: make a network namespace: %w", ErrUnavailable, err)
		}
		fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	return fd, err
}

// prefix is the range for measurements of networks, which is not routed (RFC
// 2544). Each line takes four addresses of it.
var prefix = netip.MustParsePrefix("198.18.0.0/15")

const lines = 1 << 15

func addr(line, host int) netip.Addr {
	n := line*4 + host
	b := prefix.Addr().As4()
	return netip.AddrFrom4([4]byte{b[0], b[1] + byte(n>>16), byte(n >> 8), byte(n)})
}

// deviceName is a device's name at both ends. A line's addresses follow from it,
// so that the kernel, which refuses the same name twice, keeps lines apart.
func deviceName(line int) string { return fmt.Sprintf("flnetem%04x", line) }

// hostEnd makes the host's end of a line that nobody else has.
func hostEnd() (f *os.File, line int, err error) {
	for range 16 {
		line = rand.IntN(lines)
		f, err = tun(deviceName(line))
		if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) {
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		if err := ifup(deviceName(line), addr(line, 1), 30); err != nil {
			return nil, 0, errors.Join(err, f.Close())
		}
		return f, line, nil
	}
	return nil, 0, fmt.Errorf("no free device: %w", err)
}

// tun makes a TUN device in the calling thread's namespace. It goes with the file.
func tun(name string) (*os.File, error) {
	const dev = "/dev/net/tun"
	fd, err := unix.Open(dev, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnavailable, dev, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dev, err)
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_TUN_EXCL)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		err = fmt.Errorf("make the device %s: %w", name, err)
		if errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), name), nil
}

// ifup sets a device's address, unless it is the zero one, and switches it on.
func ifup(name string, a netip.Addr, bits int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("device %s: %w", name, err)
	}
	defer func() { _ = unix.Close(fd) }()
	ifr, err := unix.NewIfreq(name)
	if err == nil && a.IsValid() {
		mask := ^uint32(0) << (32 - bits)
		for _, x := range []struct {
			request uint
			a       []byte
		}{
			{unix.SIOCSIFADDR, a.AsSlice()},
			{unix.SIOCSIFNETMASK, []byte{byte(mask >> 24), byte(mask >> 16), byte(mask >> 8), byte(mask)}},
		} {
			if err == nil {
				err = errors.Join(ifr.SetInet4Addr(x.a), unix.IoctlIfreq(fd, x.request, ifr))
			}
		}
	}
	if err == nil {
		ifr.SetUint32(maxQueue) // the device's own queue drops what the program is late to read
		err = unix.IoctlIfreq(fd, unix.SIOCSIFTXQLEN, ifr)
	}
	if err == nil {
		ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
		err = unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
	}
	if err != nil {
		return fmt.Errorf("switch the device %s on: %w", name, err)
	}
	return nil
}
