// Package netem is a bad line. The kernel's own emulator (sch_netem) is missing
// on many machines; this one needs root, network namespaces and /dev/net/tun.
//
// A [Line] joins a network namespace of its own with the host by a pair of TUN
// devices, and carries their IPv4 packets itself: late, out of order, twice or
// not at all, as its [Conditions] say, which may change at any time. TCP above
// it is the kernel's, so a line that drops everything is a half-open one.
//
//	l, err := netem.Open(1)               // a seed; errors.Is(err, netem.ErrUnavailable): not on this machine
//	defer l.Close()
//	err = l.Do(func() error { ... })      // in the namespace; dial l.Host from there
//	l.Set(netem.Both(netem.Path{Delay: 100 * time.Millisecond, Jitter: 50 * time.Millisecond, Loss: 0.05}))
//	l.Set(netem.Both(netem.Path{Cut: true}))
//	l.Reset()                             // every TCP connection is answered with RST
//
// Nothing has to be cleaned up, not even after a kill: the namespace has no name
// and the devices belong to the process.
package netem
