package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
	"github.com/fairlead-io/fairlead/tools/netem"
	"github.com/fairlead-io/fairlead/tools/stack"
	"github.com/fairlead-io/fairlead/tools/testslave"
)

// far is a site in a network namespace of its own, whose only way to the cloud
// is a line that can be made bad.
type far struct {
	*site
	line   *netem.Line
	rng    *rand.Rand
	alarms string
	sent   int     // events so far
	came   seen    // what came of them in the cloud
	moved  [2]seen // what came of the state, on the node and in the cloud
}

func openLine(t *testing.T, seed uint64) *netem.Line {
	t.Helper()
	l, err := netem.Open(seed)
	if errors.Is(err, netem.ErrUnavailable) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// newFar starts a node, its mapper and a slave at the end of a line. Extra
// arguments go to the agent's command line.
func newFar(t *testing.T, node, cloud string, seed uint64, extra ...string) *far {
	t.Helper()
	f := &far{line: openLine(t, seed), rng: rand.New(rand.NewPCG(seed, 1)), alarms: "fl/" + node + "/event/alarm/pump-1"}
	f.site = &site{t: t, ns: node, extra: append([]string{"--cloud", "mqtt://" + cloud}, extra...)}
	err := f.line.Do(func() (err error) { f.slave, err = testslave.New(); return err })
	if errors.Is(err, testslave.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.slave.Kill)
	kubectl(t, "create", "namespace", node)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	// The bus is reached by its file, from either side of the line.
	f.edge, err = fab.StartEdge(ctx, &stack.Edge{
		Node: node, Bus: "unix://" + filepath.Join(fab.Dir, node+".sock"), Dir: filepath.Join(fab.Dir, "edge-"+node), Enter: f.line.Enter,
	}, f.extra...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.line.Set(netem.Conditions{})
		f.edge.Stop()
		s := f.line.Stats()
		t.Logf("the line carried %d bytes up and %d down; up %+v, down %+v, %d resets", s.Up.Bytes, s.Down.Bytes, s.Up, s.Down, s.Resets)
		if t.Failed() {
			t.Logf("%s:\n%s", f.edge.Name, f.edge.Tail(40))
		}
	})
	if f.mapper, err = fab.StartMapper(ctx, f.edge); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.mapper.Stop)
	f.applyDevice()
	f.listen(&f.came, fab.CloudLocal, "event/#")
	for i, addr := range []string{f.edge.Bus, fab.CloudLocal} {
		f.listen(&f.moved[i], addr, "desired/#", "reported/#")
	}
	eventually(t, "events come to the cloud", func() (string, bool) {
		if err := publish(f.edge.Bus, f.alarms, hello); err != nil {
			t.Fatal(err)
		}
		return "", f.came.count() > 0
	})
	f.reading(fab.CloudLocal, "level", value("0"))
	return f
}

// listen subscribes to topics of the node until the test ends; digests are left out.
func (f *far) listen(to *seen, addr string, topics ...string) {
	f.t.Helper()
	args := append(split(addr), "-V", "5", "-q", "1", "-T", "fl/+/+/digest", "-F", "%t %p")
	for _, tp := range topics {
		args = append(args, "-t", "fl/"+f.ns+"/"+tp)
	}
	sub := exec.Command("mosquitto_sub", args...)
	sub.Stdout = to
	if err := sub.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = sub.Process.Kill(); _ = sub.Wait() })
}

// still is for when all has arrived: it tells how long after a moment the last
// change of the state came, on either side, and the last event.
func (f *far) still(since time.Time) string {
	state := later(f.moved[0].when(), f.moved[1].when())
	after := func(t time.Time) time.Duration { return max(0, t.Sub(since)).Round(time.Millisecond) }
	return fmt.Sprintf("the state after %s and the events after %s", after(state), after(f.came.when()))
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// hello is the event that finds out whether anybody listens.
const hello = "hello"

// raise publishes n more events, numbered from 1 on over all calls.
func (f *far) raise(n int) {
	f.t.Helper()
	lines(f.t, f.edge.Bus, f.alarms, f.sent+1, f.sent+n)
	f.sent += n
}

// raised waits for the last event and checks that all of them came, in order and once.
func (f *far) raised() {
	f.t.Helper()
	numbered := func() []string {
		return slices.DeleteFunc(f.came.lines(), func(l string) bool { return strings.HasSuffix(l, " "+hello) })
	}
	last := fmt.Sprintf("%s %d", f.alarms, f.sent)
	eventually(f.t, "the last event is in the cloud", func() (string, bool) {
		l := numbered()
		return fmt.Sprintf("%d of %d", len(l), f.sent), slices.Contains(l, last)
	})
	eventually(f.t, "no more events come", func() (string, bool) { return "", f.came.settled() })
	got := numbered()
	for i, l := range got {
		if want := fmt.Sprintf("%s %d", f.alarms, i+1); l != want {
			f.t.Fatalf("event %d is %q, want %q", i+1, l, want)
		}
	}
	if len(got) != f.sent {
		f.t.Fatalf("%d events came, want %d", len(got), f.sent)
	}
}

// change changes something of every kind on both sides: a wish of the cloud, a
// local one, a reading and events. The i-th call differs from the one before.
func (f *far) change(i int) {
	f.t.Helper()
	kubectl(f.t, "-n", f.ns, "patch", "device", "pump-1", "--type", "merge", "-p", fmt.Sprintf(`{"spec":{"desired":{"speed":%d}}}`, speed(i)))
	f.slave.Set("input", levelInput, uint16(1000+i))
	if err := f.set("pump", strconv.FormatBool(i%2 == 0)); err != nil {
		f.t.Fatal(err)
	}
	f.raise(25)
}

func speed(i int) int { return 1 + i%100 }

// changed waits until the i-th change has arrived where it belongs, and both
// sides hold the same.
func (f *far) changed(i int) {
	f.t.Helper()
	f.register(speedHolding, uint16(speed(i)))
	pump := strconv.FormatBool(i%2 == 0)
	f.reading(fab.CloudLocal, "level", value(strconv.Itoa(1000+i)))
	f.reading(fab.CloudLocal, "speed", value(strconv.Itoa(speed(i))))
	f.reading(fab.CloudLocal, "pump", value(pump))
	var tg payload.Target
	m := f.agree()
	if err := json.Unmarshal([]byte(m[string(f.target("pump"))]), &tg); err != nil || tg.By != payload.ByLocal || string(tg.V) != pump {
		f.t.Errorf("the local wish is %+v in the cloud, %v, want %s", tg, err, pump)
	}
	f.raised()
}

// link waits until a broker shows the node's link so.
func (f *far) link(addr string, online bool) {
	f.t.Helper()
	w := watch(f.t, addr, string(topic.ReportedLink(f.edge.Node)))
	w.until(f.t, fmt.Sprintf("on %s the link is online=%t", addr, online), func(_ string, p []byte) bool {
		var l payload.Link
		return json.Unmarshal(p, &l) == nil && l.Online == online
	})
}

// links waits until both sides show the node's link so.
func (f *far) links(online bool) {
	f.t.Helper()
	f.link(f.edge.Bus, online)
	f.link(fab.CloudLocal, online)
}

// The node and the cloud stay the same over a line that is as bad as lines are.
func TestPartition(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	// The cloud gets a listener at the host's end of a line: from a namespace
	// that is the way to the host.
	port, err := stack.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	cloud := net.JoinHostPort(openLine(t, seed).Host.String(), strconv.Itoa(port))
	before := cloudArgs
	fab.Cloud.Stop()
	t.Cleanup(func() {
		fab.Cloud.Stop()
		cloudArgs = before
		startCloud(t)
	})
	cloudArgs = append(slices.Clone(before), "--mqtt", cloud)
	startCloud(t)

	// They start one after the other and then run side by side.
	for _, x := range []struct {
		name string
		run  func(*testing.T, *far)
		args []string
	}{
		{"cuts", cuts, nil}, // the longest
		{"half-open", halfOpen, []string{"--keepalive", "2s"}},
		{"lossy", lossy, nil},
		{"one-way", oneWay, []string{"--keepalive", "2s"}},
	} {
		t.Run(x.name, func(t *testing.T) {
			f := newFar(t, "n-"+x.name, cloud, seed, x.args...)
			t.Parallel()
			x.run(t, f)
		})
	}
}

// A line with delay, loss, duplicates and packets out of order: everything arrives.
func lossy(t *testing.T, f *far) {
	f.line.Set(netem.Both(netem.Path{
		Delay: 100 * time.Millisecond, Jitter: 50 * time.Millisecond, Loss: 0.05, Duplicate: 0.05, Reorder: 0.05,
	}))
	const n = 12
	for i := 1; i <= n; i++ {
		f.change(i)
	}
	began := time.Now()
	f.changed(n)
	t.Logf("all was there on the bad line, counted from the last change: %s", f.still(began))
	s := f.line.Stats()
	for _, p := range []netem.PathStats{s.Up, s.Down} {
		if p.Lost == 0 || p.Duplicated == 0 || p.Overtaking == 0 {
			t.Errorf("the line was better than it was to be: %+v", p)
		}
	}
}

const manyModel = `
apiVersion: fairlead.dev/v1alpha1
kind: DeviceModel
metadata: {name: many, namespace: %[1]s}
spec:
  protocol: modbus
  properties:
`

const manyDevice = `
---
apiVersion: fairlead.dev/v1alpha1
kind: Device
metadata: {name: %[1]s, namespace: %[2]s}
spec: {nodeName: %[2]s, model: many, modbus: {address: "%[3]s", unit: 1}}
`

// many is how many topics each side changes while the line is cut.
const many = 200

func point(i int) string { return fmt.Sprintf("p%03d", i) }

// A line that drops everything is noticed by both sides. What they change
// meanwhile is the same on both afterwards.
func halfOpen(t *testing.T, f *far) {
	var yaml bytes.Buffer
	fmt.Fprintf(&yaml, manyModel, f.ns)
	for i := range many {
		fmt.Fprintf(&yaml, "  - {name: %s, type: uint16, access: rw, pollInterval: 1h, modbus: {table: holdingRegister, address: %d}}\n", point(i), 100+i)
	}
	fmt.Fprintf(&yaml, manyDevice, "far", f.ns, f.slave.Addr)
	fmt.Fprintf(&yaml, manyDevice, "near", f.ns, f.slave.Addr)
	apply(t, yaml.String())
	eventually(t, "the devices are on the node", func() (string, bool) {
		m := snapshot(t, f.edge.Bus, "fl/+/desired/device/#")
		return fmt.Sprint(len(m)), m[string(topic.DesiredDevice(f.edge.Node, f.ns, "far"))] != "" && m[string(topic.DesiredDevice(f.edge.Node, f.ns, "near"))] != ""
	})
	f.links(true)
	f.agree()

	f.line.Set(netem.Both(netem.Path{Cut: true}))
	f.links(false)
	wishes := map[string]int{}
	for i := range many {
		wishes[point(i)] = 1000 + i
	}
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"desired": wishes}})
	if err != nil {
		t.Fatal(err)
	}
	kubectl(t, "-n", f.ns, "patch", "device", "far", "--type", "merge", "-p", string(patch))
	f.wish("near", 2000)
	f.change(1)
	desired := string(topic.Root) + "/" + f.edge.Node + "/desired/twin/" + f.ns + "/far/#"
	targets := string(topic.Root) + "/" + f.edge.Node + "/reported/target/" + f.ns + "/near/#"
	eventually(t, "the cloud's changes are on its broker", func() (string, bool) {
		n := len(snapshot(t, fab.CloudLocal, desired))
		return fmt.Sprint(n), n == many
	})
	// What the node acknowledged is there, and nothing crossed the line.
	for _, x := range []struct {
		addr, filter string
		want         int
	}{{f.edge.Bus, targets, many}, {fab.CloudLocal, targets, 0}, {f.edge.Bus, desired, 0}} {
		if n := len(snapshot(t, x.addr, x.filter)); n != x.want {
			t.Errorf("%d topics of %s on %s while the line is cut, want %d", n, x.filter, x.addr, x.want)
		}
	}
	carried := f.line.Stats()
	began := time.Now()
	f.line.Set(netem.Conditions{})
	f.links(true)
	up := time.Since(began)
	f.changed(1)
	m := f.agree()
	s := f.line.Stats()
	t.Logf("healed: the link was shown after %s, %s; %d bytes up, %d down", up.Round(time.Millisecond), f.still(began),
		s.Up.Bytes-carried.Up.Bytes, s.Down.Bytes-carried.Down.Bytes)
	for i := range many {
		var w payload.Wish
		if err := json.Unmarshal([]byte(m[string(topic.DesiredTwin(f.edge.Node, f.ns, "far", point(i)))]), &w); err != nil || string(w.V) != strconv.Itoa(1000+i) {
			t.Fatalf("wish %d of the cloud is %+v, %v", i, w, err)
		}
		for device, want := range map[string]payload.Target{
			"far": {V: json.RawMessage(strconv.Itoa(1000 + i)), By: payload.ByCloud}, "near": {V: json.RawMessage(strconv.Itoa(2000 + i)), By: payload.ByLocal},
		} {
			var got payload.Target
			err := json.Unmarshal([]byte(m[string(topic.ReportedTarget(f.edge.Node, f.ns, device, point(i)))]), &got)
			if err != nil || string(got.V) != string(want.V) || got.By != want.By {
				t.Fatalf("target %s of %s is %+v, %v, want %+v", point(i), device, got, err, want)
			}
		}
	}
}

// wish sets all points of a device on the node's bus, from first on; each is acknowledged.
func (f *far) wish(device string, first int) {
	f.t.Helper()
	up := make(chan struct{})
	c, err := client.New(client.Config{URL: f.edge.Bus, ClientID: "operator", OnUp: func(context.Context) { close(up) }})
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(f.t.Context(), patience)
	var run sync.WaitGroup
	run.Go(func() { _ = c.Run(ctx) })
	defer run.Wait()
	defer cancel()
	select {
	case <-up:
	case <-ctx.Done():
		f.t.Fatal(ctx.Err())
	}
	for i := range many {
		err := c.Publish(ctx, client.Message{Topic: topic.Set(f.edge.Node, f.ns, device, point(i)), Payload: []byte(strconv.Itoa(first + i)), QoS: 1})
		if err != nil {
			f.t.Fatalf("set %s: %v", point(i), err)
		}
	}
}

// The line is cut at random moments, by RST after some bytes and by dropping
// everything for a moment, while changes flow.
func cuts(t *testing.T, f *far) {
	stop := make(chan struct{})
	var cutter sync.WaitGroup
	end := sync.OnceFunc(func() { close(stop); cutter.Wait() })
	defer end()
	moments := 0
	cutter.Go(func() {
		pause := func(least, most int) bool {
			select {
			case <-stop:
				return false
			case <-time.After(time.Duration(least+f.rng.IntN(most-least)) * time.Millisecond):
				return true
			}
		}
		for {
			f.line.Set(netem.Conditions{FlowBytes: 2000 + f.rng.Int64N(20000)})
			if !pause(50, 400) {
				return
			}
			moments++
			f.line.Set(netem.Both(netem.Path{Cut: true}))
			if !pause(10, 200) {
				return
			}
			if f.rng.IntN(8) == 0 {
				f.line.Reset()
			}
		}
	})
	// The agent waits twice as long after each cut before it dials again.
	const resets, least = 5, 10
	n := 0
	eventually(t, "enough cuts", func() (string, bool) {
		n++
		f.change(n)
		s := f.line.Stats()
		return fmt.Sprintf("%d changes, %d resets", n, s.Resets), n >= least && s.Resets >= resets
	})
	end()
	n++
	f.change(n)
	began := time.Now()
	f.line.Set(netem.Conditions{})
	f.changed(n)
	t.Logf("after %d cuts and %d connections reset, over %d changes and %d events, all was there: %s",
		moments, f.line.Stats().Resets, n, f.sent, f.still(began))
}

// One direction drops everything, the other works: both sides notice either way.
func oneWay(t *testing.T, f *far) {
	cut := netem.Path{Cut: true}
	for i, x := range []struct {
		name string
		c    netem.Conditions
	}{{"up", netem.Conditions{Up: cut}}, {"down", netem.Conditions{Down: cut}}} {
		f.links(true)
		f.line.Set(x.c)
		f.links(false)
		f.change(i + 1)
		began := time.Now()
		f.line.Set(netem.Conditions{})
		f.links(true)
		f.changed(i + 1)
		t.Logf("%s alone cut, then healed: %s", x.name, f.still(began))
	}
}
