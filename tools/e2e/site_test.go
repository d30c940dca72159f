package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
	"github.com/fairlead-io/fairlead/tools/stack"
	"github.com/fairlead-io/fairlead/tools/testslave"
)

// site is a node with a mapper and one device, in a namespace of its own.
type site struct {
	t      *testing.T
	ns     string
	edge   *stack.Edge
	mapper *stack.Process
	slave  *testslave.Slave
	extra  []string // of the agent's command line
}

// The device of the tests: where its properties lie on the slave.
const (
	levelInput   = 0  // input register, uint16, read only
	tempHolding  = 10 // holding registers, float32, read only
	speedHolding = 20 // holding register, uint16, 0 to 100
	pumpCoil     = 3  // coil
)

const deviceYAML = `
apiVersion: fairlead.dev/v1alpha1
kind: DeviceModel
metadata: {name: pump, namespace: %[1]s}
spec:
  protocol: modbus
  properties:
  - {name: level, type: uint16, unit: mm, pollInterval: 100ms, modbus: {table: inputRegister, address: 0}}
  - {name: temp, type: float32, unit: "°C", pollInterval: 100ms, modbus: {table: holdingRegister, address: 10}}
  - {name: speed, type: uint16, unit: "%%", access: rw, min: 0, max: 100, pollInterval: 100ms, modbus: {table: holdingRegister, address: 20}}
  - {name: pump, type: bool, access: rw, pollInterval: 100ms, modbus: {table: coil, address: 3}}
---
apiVersion: fairlead.dev/v1alpha1
kind: Device
metadata: {name: pump-1, namespace: %[1]s}
spec:
  nodeName: %[2]s
  model: pump
  modbus: {address: "%[3]s", unit: 1, timeout: 300ms}
`

// newSite starts a node, its mapper and a slave, and applies the device. Extra
// arguments go to the agent's command line.
func newSite(t *testing.T, node string, extra ...string) *site {
	t.Helper()
	s := &site{t: t, ns: node, slave: testslave.Start(t), extra: extra}
	kubectl(t, "create", "namespace", s.ns)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	var err error
	if s.edge, err = fab.StartEdge(ctx, &stack.Edge{Node: node}, extra...); err != nil {
		t.Fatal(err)
	}
	if s.mapper, err = fab.StartMapper(ctx, s.edge); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.mapper.Stop()
		s.edge.Stop()
		if t.Failed() {
			for _, p := range []*stack.Process{fab.Cloud, s.edge.Process, s.mapper} {
				t.Logf("%s:\n%s", p.Name, p.Tail(25))
			}
		}
	})
	s.applyDevice()
	return s
}

func (s *site) applyDevice() {
	s.t.Helper()
	apply(s.t, fmt.Sprintf(deviceYAML, s.ns, s.edge.Node, s.slave.Addr))
}

// restartEdge brings the node's agent back on its data and port.
func (s *site) restartEdge() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*patience)
	defer cancel()
	if _, err := fab.StartEdge(ctx, s.edge, s.extra...); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) twin(property string) topic.Topic {
	return topic.ReportedTwin(s.edge.Node, s.ns, "pump-1", property)
}

func (s *site) target(property string) topic.Topic {
	return topic.ReportedTarget(s.edge.Node, s.ns, "pump-1", property)
}

// reading waits until the property's reading satisfies ok on the broker.
func (s *site) reading(addr, property string, ok func(payload.Reading) bool) payload.Reading {
	s.t.Helper()
	w := watch(s.t, addr, string(s.twin(property)))
	var r payload.Reading
	w.until(s.t, "reading of "+property, func(_ string, p []byte) bool {
		r = payload.Reading{}
		return json.Unmarshal(p, &r) == nil && ok(r)
	})
	return r
}

func value(v string) func(payload.Reading) bool {
	return func(r payload.Reading) bool { return r.Good() && string(r.V) == v }
}

// set publishes a local wish as an MQTT 5 client and gives mosquitto_pub's words
// if it was refused.
func (s *site) set(property, v string) error {
	return publish(s.edge.Bus, string(topic.Set(s.edge.Node, s.ns, "pump-1", property)), v)
}

// register waits until a holding register of the slave has the value.
func (s *site) register(address int, want uint16) {
	s.t.Helper()
	eventually(s.t, fmt.Sprintf("holding register %d is %d", address, want), func() (string, bool) {
		got := s.slave.Get("holding", address)[0]
		return fmt.Sprint("it is ", got), got == want
	})
}

func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := fab.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func apply(t *testing.T, yaml string) {
	t.Helper()
	if _, err := fab.KubectlIn(t.Context(), []byte(yaml), "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
}

// eventually polls until ok; what says what is waited for, the string what was
// seen last.
func eventually(t *testing.T, what string, ok func() (string, bool)) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		seen, good := ok()
		if good {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("never: %s; last seen: %s", what, seen)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// split makes mosquitto's arguments of a broker's address.
func split(addr string) []string {
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		return []string{"--unix", path}
	}
	h, p, err := net.SplitHostPort(addr)
	if err != nil {
		panic(err)
	}
	return []string{"-h", h, "-p", p}
}

// publish sends one QoS 1 message with Debian's mosquitto_pub.
func publish(addr, topic, v string, extra ...string) error {
	args := slices.Concat(split(addr), []string{"-V", "5", "-q", "1", "-t", topic, "-m", v}, extra)
	out, err := exec.Command("mosquitto_pub", args...).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("failed")) {
		return errors.Join(err, errors.New(strings.TrimSpace(string(out))))
	}
	return nil
}

// watcher is a running mosquitto_sub.
type watcher struct {
	lines chan string
	done  chan struct{}
}

// watch subscribes with Debian's mosquitto_sub until the test ends.
func watch(t *testing.T, addr, filter string) *watcher {
	t.Helper()
	args := append(split(addr), "-V", "5", "-q", "1", "-t", filter, "-F", "%t\t%p")
	cmd := exec.Command("mosquitto_sub", args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w := &watcher{lines: make(chan string, 100000), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		s := bufio.NewScanner(out)
		s.Buffer(nil, 8<<20)
		for s.Scan() {
			w.lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-w.done
		_ = cmd.Wait()
	})
	return w
}

// until waits for a message that satisfies ok.
func (w *watcher) until(t *testing.T, what string, ok func(topic string, p []byte) bool) {
	t.Helper()
	deadline := time.After(patience)
	last := "nothing"
	for {
		select {
		case l := <-w.lines:
			last = l
			tp, p, _ := strings.Cut(l, "\t")
			if ok(tp, []byte(p)) {
				return
			}
		case <-w.done:
			t.Fatalf("mosquitto_sub ended while waiting for %s; last: %s", what, last)
		case <-deadline:
			t.Fatalf("never: %s; last message: %s", what, last)
		}
	}
}

// snapshot reads the retained messages that a filter selects.
func snapshot(t *testing.T, addr, filter string) map[string]string {
	t.Helper()
	args := append(split(addr), "-V", "5", "-q", "1", "-t", filter, "-F", "%t\t%p", "--retained-only", "-W", "1")
	out, err := exec.Command("mosquitto_sub", args...).Output()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 27) { // 27: -W's time is over
		t.Fatalf("mosquitto_sub %s: %v: %s", strings.Join(args, " "), err, exit.Stderr)
	}
	m := map[string]string{}
	for l := range strings.Lines(string(out)) {
		tp, p, ok := strings.Cut(strings.TrimSuffix(l, "\n"), "\t")
		if ok && p != "" {
			m[tp] = p
		}
	}
	return m
}

// state is the node's digested state on a broker: what both sides must agree on.
func state(t *testing.T, addr, node string) map[string]string {
	t.Helper()
	m := snapshot(t, addr, string(topic.NodeAll(node)))
	maps.DeleteFunc(m, func(k, _ string) bool {
		p, err := topic.Parse(k)
		if err != nil {
			return true
		}
		_, ok := p.Direction()
		return !ok
	})
	return m
}

// agree waits until the node and the cloud hold the same, topic for topic.
func (s *site) agree() map[string]string {
	s.t.Helper()
	var here map[string]string
	eventually(s.t, "node and cloud agree", func() (string, bool) {
		here = state(s.t, s.edge.Bus, s.edge.Node)
		there := state(s.t, fab.CloudLocal, s.edge.Node)
		return difference(here, there), maps.Equal(here, there)
	})
	return here
}

func difference(here, there map[string]string) string {
	var b strings.Builder
	for k, v := range here {
		if there[k] != v {
			fmt.Fprintf(&b, "\n%s\n  node:  %.200s\n  cloud: %.200s", k, v, there[k])
		}
	}
	for k, v := range there {
		if _, ok := here[k]; !ok {
			fmt.Fprintf(&b, "\n%s\n  node:  -\n  cloud: %.200s", k, v)
		}
	}
	return b.String()
}
