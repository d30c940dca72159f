package broker_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const crashClients = 6

// crew drives the clients of a ledger against a broker. The steps come from a
// seed; what runs between them at the same time is the machine's.
type crew struct {
	dial  func() (net.Conn, error)
	tasks sync.WaitGroup

	mu struct {
		sync.Mutex
		l       *ledger
		log     []entry
		wires   []*wire // the current connections
		byes    []*wire // those on which DISCONNECT was sent last
		stopped bool    // the broker is dead: nothing counts any more
	}
}

// entry is one thing that happened. A ledger is what its entries made of it, so
// that the clients' knowledge at any moment of the past can be had again.
type entry struct {
	at   time.Time
	text string
	do   func(*ledger) []packets.Packet
}

func newCrew(l *ledger, log []entry) *crew {
	c := &crew{}
	c.mu.l, c.mu.log = l, slices.Clone(log)
	c.mu.wires, c.mu.byes = make([]*wire, len(l.clients)), make([]*wire, len(l.clients))
	return c
}

// replay makes the ledger of a log.
func replay(seed uint64, log []entry) *ledger {
	l := newLedger(seed, crashClients)
	for i, e := range log {
		l.now, l.seq = e.at, i+1
		e.do(l)
	}
	return l
}

func (c *crew) noteLocked(text string, do func(*ledger) []packets.Packet) []packets.Packet {
	c.mu.log = append(c.mu.log, entry{time.Now(), text, do})
	c.mu.l.now, c.mu.l.seq = time.Now(), len(c.mu.log)
	return do(c.mu.l)
}

func (c *crew) note(text string, do func(*ledger) []packets.Packet) []packets.Packet {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.noteLocked(text, do)
}

// send notes what a client is about to send on its connection, and sends it.
func (c *crew) send(n int, text string, do func(*ledger) []packets.Packet) {
	c.mu.Lock()
	w := c.mu.wires[n]
	if w == nil || !c.mu.l.clients[n].up || c.mu.stopped {
		c.mu.Unlock()
		return
	}
	pks := c.noteLocked(fmt.Sprintf("c%d %s", n, text), do)
	c.mu.Unlock()
	for _, pk := range pks {
		_ = w.send(pk) // its end is the reader's to see
	}
}

func (c *crew) connect(n int, clean, will bool) error {
	nc, err := c.dial()
	if err != nil {
		return err
	}
	c.mu.Lock()
	if c.mu.stopped {
		c.mu.Unlock()
		return nc.Close()
	}
	old := c.mu.wires[n]
	w := newWire(nc, c.mu.l.clients[n].v)
	c.mu.wires[n] = w
	pks := c.noteLocked(fmt.Sprintf("c%d CONNECT clean %v will %v", n, clean, will), func(l *ledger) []packets.Packet {
		return []packets.Packet{l.connect(n, clean, will)}
	})
	c.mu.Unlock()
	c.tasks.Go(func() { c.read(n, w) })
	_ = w.send(pks[0])
	if old != nil {
		c.tasks.Go(func() { // the broker ends it, and has a while for it
			_ = old.SetReadDeadline(time.Now().Add(patience))
		})
	}
	return nil
}

func (c *crew) read(n int, w *wire) {
	defer func() { _ = w.Close() }()
	for {
		pk, err := w.next()
		c.mu.Lock()
		current := c.mu.wires[n] == w
		switch {
		case c.mu.stopped:
			err = net.ErrClosed
		case err != nil && current:
			c.mu.wires[n] = nil
			c.noteLocked(fmt.Sprintf("c%d connection ended: %v", n, err), func(l *ledger) []packets.Packet {
				l.fail(l.clients[n], "the broker ended the connection")
				l.gone(n, false)
				return nil
			})
		case errors.Is(err, io.EOF) && c.mu.byes[n] == w:
			c.noteLocked(fmt.Sprintf("c%d saw the end", n), func(l *ledger) []packets.Packet { l.hungUp(n); return nil })
		}
		var out []packets.Packet
		if err == nil && current {
			out = c.noteLocked(fmt.Sprintf("c%d got %s", n, packetText(pk)), func(l *ledger) []packets.Packet { return l.receive(n, pk) })
		}
		c.mu.Unlock()
		if err != nil {
			return
		}
		for _, pk := range out {
			_ = w.send(pk)
		}
	}
}

// leave ends a connection, with DISCONNECT 0x00 or without.
func (c *crew) leave(n int, bye bool) {
	c.mu.Lock()
	w := c.mu.wires[n]
	if w == nil || c.mu.stopped || bye && !c.mu.l.clients[n].up {
		c.mu.Unlock()
		return
	}
	c.mu.wires[n] = nil
	if bye {
		c.mu.byes[n] = w
	}
	c.noteLocked(fmt.Sprintf("c%d leaves, DISCONNECT %v", n, bye), func(l *ledger) []packets.Packet { l.gone(n, bye); return nil })
	c.mu.Unlock()
	if bye {
		_ = w.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}})
		_ = w.SetReadDeadline(time.Now().Add(patience)) // the broker hangs up
		return
	}
	_ = w.Close()
}

// stop is the moment of the crash: nothing that comes later counts.
func (c *crew) stop() (log []entry) {
	c.mu.Lock()
	c.mu.stopped = true
	wires := slices.Clone(c.mu.wires)
	log = c.mu.log
	c.mu.Unlock()
	for _, w := range wires {
		if w != nil {
			_ = w.Close()
		}
	}
	return log
}

func (c *crew) err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.l.err
}

func (c *crew) missing() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.l.missing()
}

func packetText(pk packets.Packet) string {
	s := packets.PacketNames[pk.FixedHeader.Type]
	if pk.FixedHeader.Type == packets.Publish {
		return fmt.Sprintf("%s %d %s %q qos %d dup %v retain %v", s, pk.PacketID, pk.TopicName, pk.Payload, pk.FixedHeader.Qos, pk.FixedHeader.Dup, pk.FixedHeader.Retain)
	}
	return fmt.Sprintf("%s %d 0x%02x", s, pk.PacketID, pk.ReasonCode)
}

// history is the end of a log, for the reader of a failure.
func history(log []entry) string {
	const last = 150
	var b strings.Builder
	from := max(0, len(log)-last)
	if from > 0 {
		fmt.Fprintf(&b, "(%d entries before)\n", from)
	}
	for i, e := range log[from:] {
		fmt.Fprintf(&b, "%5d %s\n", from+i+1, e.text)
	}
	return b.String()
}

var crashFilters = []string{"t/#", "t/0", "t/+", "r/#", "r/0/+", "r/+/1", "w/#", "#"}

// work does random steps. pause lets the broker catch up now and then.
func (c *crew) work(rng *rand.Rand, steps int, pause func(d time.Duration)) error {
	for range steps {
		if err := c.err(); err != nil {
			return err
		}
		n := rng.IntN(crashClients)
		c.mu.Lock()
		up, connecting, stopped := c.mu.l.clients[n].up, c.mu.l.clients[n].connecting, c.mu.stopped
		c.mu.Unlock()
		if stopped {
			return nil
		}
		if !up {
			if !connecting { // whose CONNECT comes first would be open
				if err := c.connect(n, rng.IntN(12) == 0, rng.IntN(3) == 0); err != nil {
					return err
				}
			}
			if rng.IntN(4) > 0 {
				pause(0)
			}
			continue
		}
		switch k := rng.IntN(100); {
		case k < 55:
			for range 1 + rng.IntN(6) {
				name, qos, retain := fmt.Sprintf("t/%d", rng.IntN(3)), byte(rng.IntN(3)), false
				if rng.IntN(3) == 0 {
					// One QoS for each: a QoS 1 message that is sent again comes after
					// a QoS 2 message that is not.
					k := rng.IntN(3)
					name, retain, qos = fmt.Sprintf("r/%d/%d", n, k), true, byte(k)
				}
				empty, expiry := retain && rng.IntN(4) == 0, uint32(0)
				if rng.IntN(10) == 0 {
					expiry = 2
				}
				c.send(n, fmt.Sprintf("PUBLISH %s qos %d retain %v empty %v expiry %d", name, qos, retain, empty, expiry), func(l *ledger) []packets.Packet {
					return []packets.Packet{l.publish(n, name, qos, retain, empty, expiry)}
				})
			}
		case k < 68:
			filter, qos := crashFilters[rng.IntN(len(crashFilters))], byte(rng.IntN(3))
			c.send(n, fmt.Sprintf("SUBSCRIBE %s qos %d", filter, qos), func(l *ledger) []packets.Packet { return []packets.Packet{l.subscribe(n, filter, qos)} })
		case k < 73:
			filter := crashFilters[rng.IntN(len(crashFilters))]
			c.send(n, "UNSUBSCRIBE "+filter, func(l *ledger) []packets.Packet { return []packets.Packet{l.unsubscribe(n, filter)} })
		case k < 79:
			c.send(n, "becomes slow", func(l *ledger) []packets.Packet { l.clients[n].hold = true; return nil })
		case k < 85:
			c.send(n, "answers all", func(l *ledger) []packets.Packet { return l.release(n) })
		case k < 91:
			c.leave(n, rng.IntN(2) == 0)
		case k < 94: // a takeover
			if err := c.connect(n, rng.IntN(8) == 0, rng.IntN(3) == 0); err != nil {
				return err
			}
		case k < 98:
			pause(0)
		default:
			pause(time.Duration(rng.IntN(5)) * time.Second)
		}
	}
	return nil
}

// syncs is a file system that tells of every sync, before and after.
type syncs struct {
	vfs.FS
	tell func(what string)
}

type syncedFile struct {
	vfs.File
	name string
	tell func(string)
}

func (s *syncs) wrap(f vfs.File, name string, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &syncedFile{f, s.PathBase(name), s.tell}, nil
}

func (s *syncs) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := s.FS.Create(name, c)
	return s.wrap(f, name, err)
}

func (s *syncs) OpenReadWrite(name string, c vfs.DiskWriteCategory, o ...vfs.OpenOption) (vfs.File, error) {
	f, err := s.FS.OpenReadWrite(name, c, o...)
	return s.wrap(f, name, err)
}

func (s *syncs) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := s.FS.ReuseForWrite(from, to, c)
	return s.wrap(f, to, err)
}

func (s *syncs) OpenDir(name string) (vfs.File, error) {
	f, err := s.FS.OpenDir(name)
	return s.wrap(f, name, err)
}

func (s *syncs) Unwrap() vfs.FS { return s.FS }

func (f *syncedFile) Sync() error {
	f.tell("before the sync of " + f.name)
	err := f.File.Sync()
	f.tell("after the sync of " + f.name)
	return err
}

func (f *syncedFile) SyncData() error {
	f.tell("before the sync of " + f.name)
	err := f.File.SyncData()
	f.tell("after the sync of " + f.name)
	return err
}

func (f *syncedFile) SyncTo(n int64) (bool, error) {
	f.tell("before the sync of " + f.name)
	full, err := f.File.SyncTo(n)
	f.tell("after the sync of " + f.name)
	return full, err
}

// outage is the disk as a power cut left it, and what the clients knew then.
type outage struct {
	fs   *vfs.MemFS
	at   time.Time
	what string
	log  []entry
}

// The power fails, before and after every single sync and at random moments in
// between, and each time a broker is opened on what is left of the disk: all
// that was acknowledged is there, in order, once, and nothing else.
func TestPowerLoss(t *testing.T) {
	s, rounds := seed(), 4
	if testing.Short() {
		rounds = 1
	}
	if *roundsFlag > 0 {
		rounds = *roundsFlag
	}
	outages := 0
	for i := range rounds {
		n, log, err := powerLoss(t, s+uint64(i))
		outages += n
		if err != nil {
			t.Fatalf("round %d, seed %d: %v\nhistory:\n%s", i, s+uint64(i), err, history(log))
		}
		if (i+1)%50 == 0 {
			fmt.Fprintf(os.Stderr, "power loss: %d rounds, %d outages\n", i+1, outages)
		}
	}
	t.Logf("seed %d: %d rounds with %d outages", s, rounds, outages)
}

func powerLoss(t *testing.T, s uint64) (n int, log []entry, err error) {
	disk, rng := vfs.NewCrashableMem(), rand.New(rand.NewPCG(s, 3))
	now := time.Time{}
	for range 2 {
		var outages []outage
		if outages, err = loaded(t, s, rng, disk, now, log); err != nil {
			return n, outages[len(outages)-1].log, err
		}
		for _, o := range outages {
			n++
			if log, err = recovered(t, s, o); err != nil {
				return n, log, err
			}
		}
		// The next broker goes on from the last one, and fails in its turn.
		last := outages[len(outages)-1]
		disk, now = last.fs.CrashClone(vfs.CrashCloneCfg{}), last.at
		log = append(slices.Clip(last.log), entry{last.at, "the power fails", func(l *ledger) []packets.Packet { l.crash(); l.started = l.now; return nil }})
	}
	return n, log, nil
}

// loaded runs a broker under load and collects the outages.
func loaded(t *testing.T, s uint64, rng *rand.Rand, disk *vfs.MemFS, now time.Time, log []entry) (outages []outage, err error) {
	synctest.Test(t, func(*testing.T) {
		if !now.IsZero() {
			time.Sleep(time.Until(now))
		}
		c := newCrew(replay(s, log), log)
		var cuts sync.Mutex
		dice := rand.New(rand.NewPCG(s, 4))
		cut := func(what string) {
			// The clients stand still: what they know and what the disk has are of one moment.
			c.mu.Lock()
			defer c.mu.Unlock()
			cuts.Lock()
			defer cuts.Unlock()
			if c.mu.stopped {
				return
			}
			cfg := vfs.CrashCloneCfg{UnsyncedDataPercent: []int{0, 0, 10, 50, 100}[dice.IntN(5)], RNG: dice}
			if strings.HasSuffix(what, " store") && cfg.UnsyncedDataPercent < 100 {
				// A journalling file system keeps the order of a folder's entries,
				// and Pebble builds on that when it changes its manifest.
				cfg.UnsyncedDataPercent = 0
			}
			what = fmt.Sprintf("%s, %d %% of the rest", what, cfg.UnsyncedDataPercent)
			outages = append(outages, outage{disk.CrashClone(cfg), time.Now(), what, slices.Clip(c.mu.log)})
		}
		var b *broker.Broker
		if b, err = onMem(&syncs{disk, cut}); err != nil {
			cut("end")
			return
		}
		c.dial = b.Pipe
		for range 4 {
			err = c.work(rng, 12, func(d time.Duration) {
				if d > 0 {
					time.Sleep(d)
				} else {
					synctest.Wait()
				}
			})
			if err != nil {
				break
			}
			cut("at a random moment")
		}
		cut("end")
		c.stop()
		err = errors.Join(err, b.Close())
		c.tasks.Wait()
	})
	return outages, err
}

// recovered opens a broker after an outage, lets all clients come back, and
// judges what they get.
func recovered(t *testing.T, s uint64, o outage) (log []entry, err error) {
	synctest.Test(t, func(*testing.T) {
		time.Sleep(time.Until(o.at))
		c := newCrew(replay(s, o.log), o.log)
		defer func() {
			log = c.stop()
			c.tasks.Wait()
		}()
		var wills []*lMsg
		c.note("power fails "+o.what, func(l *ledger) []packets.Packet {
			wills = l.crash()
			l.started = l.now
			return nil
		})
		var b *broker.Broker
		// A copy: Pebble writes to it, and the next round needs it as it was.
		if b, err = onMem(o.fs.CrashClone(vfs.CrashCloneCfg{})); err != nil {
			err = fmt.Errorf("open after an outage %s: %w", o.what, err)
			return
		}
		defer func() {
			c.stop()
			err = errors.Join(err, b.Close())
		}()
		c.dial = b.Pipe
		var nc net.Conn
		if nc, err = b.Pipe(); err != nil { // the first way in: Wills are published
			return
		}
		synctest.Wait()
		_ = nc.Close()
		get := func(name string) (string, bool) {
			p, ok := b.Retained(topic.Topic(name))
			return string(p), ok
		}
		if err = c.mu.l.wills(wills, get); err != nil {
			return
		}
		for n := range crashClients {
			if err = c.connect(n, false, false); err != nil {
				return
			}
		}
		synctest.Wait()
		if err = c.err(); err != nil {
			return
		}
		if m := c.missing(); m != "" {
			err = errors.New("lost: " + m)
			return
		}
		err = c.mu.l.retained(get)
	})
	return log, err
}

// killDir names the variable that makes TestKill the broker to be killed.
const killDir = "FAIRLEAD_TEST_KILL_DIR"

// The broker's process is killed under load, on a real disk and over TCP, again
// and again, and the same is asked of it.
func TestKill(t *testing.T) {
	if dir := os.Getenv(killDir); dir != "" {
		killed(t, dir)
		return
	}
	s, rounds := seed(), 6
	if testing.Short() {
		rounds = 2
	}
	if *roundsFlag > 0 {
		rounds = *roundsFlag
	}
	var log []entry
	dir, began := "", uint64(0)
	for i := range rounds {
		if i%20 == 0 { // a new store: the ledger grows as well
			if dir != "" {
				_ = os.RemoveAll(dir)
			}
			log, dir, began = nil, filepath.Join(t.TempDir(), "store"), s+uint64(i)
		}
		var err error
		if log, err = kill(t, dir, began, rand.New(rand.NewPCG(s+uint64(i), 5)), log); err != nil {
			t.Fatalf("round %d, seed %d: %v\nhistory:\n%s", i, s+uint64(i), err, history(log))
		}
		if (i+1)%50 == 0 {
			fmt.Fprintf(os.Stderr, "kill -9: %d rounds\n", i+1)
		}
	}
	t.Logf("seed %d: %d rounds", s, rounds)
}

// killed is the broker's process.
func killed(t *testing.T, dir string) {
	b, addr := open(t, dir, func(o *broker.Options) { o.Store.ReserveBytes = -1 })
	_ = b
	fmt.Println("listening " + addr)
	_, _ = io.Copy(io.Discard, os.Stdin) // until the parent has gone
}

// spawn starts the broker's process and gives its address.
func spawn(t *testing.T, dir string) (cmd *exec.Cmd, addr string, err error) {
	cmd = exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), child+"=1", killDir+"="+dir)
	if _, err = cmd.StdinPipe(); err != nil {
		return nil, "", err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	if err := cmd.Start(); err != nil {
		return nil, "", err
	}
	lines := bufio.NewScanner(out)
	var said []string
	for lines.Scan() {
		if a, ok := strings.CutPrefix(lines.Text(), "listening mqtt://"); ok {
			return cmd, a, nil
		}
		said = append(said, lines.Text())
	}
	_ = cmd.Wait()
	return nil, "", fmt.Errorf("the broker did not start: %s", strings.Join(said, "\n"))
}

func kill(t *testing.T, dir string, s uint64, rng *rand.Rand, log []entry) ([]entry, error) {
	l := replay(s, log)
	l.lax = true
	c := newCrew(l, log)
	fail := func(err error) ([]entry, error) {
		log := c.stop()
		c.tasks.Wait()
		return log, err
	}
	cmd, addr, err := spawn(t, dir)
	if err != nil {
		return fail(err)
	}
	var dead atomic.Bool
	end := sync.OnceFunc(func() {
		dead.Store(true)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	defer end()
	c.dial = func() (net.Conn, error) { return net.Dial("tcp", addr) }
	c.note("a broker", func(l *ledger) []packets.Packet { l.lax, l.started = true, l.now; return nil })
	// First of all, what the last one owes.
	for n := range crashClients {
		if err := c.connect(n, false, false); err != nil {
			return fail(err)
		}
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); ; <-tick.C {
		if err := c.err(); err != nil {
			return fail(err)
		}
		m := c.missing()
		if m == "" {
			break
		}
		if time.Now().After(deadline) {
			return fail(errors.New("lost: " + m))
		}
	}
	// Then load, and the kill in its midst.
	after := time.Duration(5+rng.IntN(60)) * time.Millisecond
	killer := make(chan struct{})
	go func() {
		defer close(killer)
		time.Sleep(after)
		c.stop()
		end()
	}()
	err = c.work(rng, 1<<20, func(time.Duration) { time.Sleep(time.Millisecond) })
	<-killer
	c.tasks.Wait()
	log = c.stop()
	if err == nil || dead.Load() {
		err = c.err()
	}
	return append(slices.Clip(log), entry{time.Now(), "kill -9", func(l *ledger) []packets.Packet { l.crash(); return nil }}), err
}
