package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/fairlead-io/fairlead/tools/stack"
)

//go:embed objects.yaml
var objects []byte

// partNames are the parts that can be stopped and started.
var partNames = []string{"cloud", "edge", "mapper", "station"}

// part is one process of the demo that may come and go.
type part struct {
	name    string
	process *stack.Process
	start   func(context.Context) (*stack.Process, error)
	since   time.Time // when it went down; zero while it is up
	stalled bool      // the station swallows requests
	says    string    // what its loss means
	address string    // where it listens, where others must know it
}

// demo is a running demo.
type demo struct {
	config
	screen *screen
	stack  *stack.Stack
	edge   *stack.Edge
	at     place
	work   string // the working directory, for paths to paste

	parts map[string]*part
	died  chan death
	bus   *view
	wg    sync.WaitGroup

	started bool // the cluster is up
	touched bool // and it is somebody else's
}

// death says that a process ended.
type death struct {
	part    string
	process *stack.Process
}

func newDemo(c config, s *screen) (*demo, error) {
	if _, err := os.Stat(filepath.Join(c.bin, "modbussim")); err != nil {
		return nil, fmt.Errorf("missing in %s: modbussim; build it with `go tool task build`", c.bin)
	}
	st, err := stack.New(stack.Config{Bin: c.bin, Dir: c.dir, Repo: c.repo, Kubeconfig: c.kubeconfig})
	if err != nil {
		return nil, err
	}
	work, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	d := &demo{config: c, screen: s, stack: st, work: work, parts: map[string]*part{}, died: make(chan death, 16)}
	var ports [3]int
	for i, want := range []struct {
		port int
		what string
	}{{c.edgePort, "the edge's bus"}, {c.cloudPort, "the cloud broker"}, {c.stationPort, "the pump station"}} {
		if ports[i], err = d.port(want.port, want.what, ports[:i]); err != nil {
			return nil, err
		}
	}
	metrics, err := stack.FreePort()
	if err != nil {
		return nil, err
	}
	st.CloudLocal = local(ports[1])
	d.edge = &stack.Edge{Node: edgeNode, Bus: local(ports[0]), Metrics: local(metrics), Dir: filepath.Join(c.dir, "edge-"+edgeNode)}
	d.at = place{bin: quote(d.shown(c.bin)), dir: quote(d.shown(c.dir)), edge: ports[0], cloud: ports[1], mosquitto: hasMosquitto()}
	if c.dir != filepath.Join(c.repo, ".demo") && d.at.dir == ".demo" {
		d.at.dir = quote(c.dir) // another .demo than the one that the command looks for by itself
	}
	station := local(ports[2])
	d.bus = newView(d.edge.Bus, st.CloudLocal)
	for _, p := range []*part{
		{name: "cloud", says: "the edge carries on without it", start: func(ctx context.Context) (*stack.Process, error) {
			err := st.StartCloud(ctx)
			return st.Cloud, err
		}},
		{name: "edge", says: "nobody drives the pump, which keeps its last setpoint", start: func(ctx context.Context) (*stack.Process, error) {
			e, err := st.StartEdge(ctx, d.edge, d.podFlags()...)
			if err != nil {
				return nil, err
			}
			return e.Process, nil
		}},
		{name: "mapper", says: "values are not read any more", start: func(ctx context.Context) (*stack.Process, error) {
			return st.StartMapper(ctx, d.edge)
		}},
		{name: "station", address: station, says: "its values turn bad, with the last ones kept", start: func(ctx context.Context) (*stack.Process, error) {
			p, _, err := st.StartTool(ctx, "modbussim", "listening on ", "--listen", station)
			return p, err
		}},
	} {
		d.parts[p.name] = p
	}
	return d, nil
}

func local(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// port gives the port, or a free one where somebody has it.
func (d *demo) port(want int, what string, taken []int) (int, error) {
	if want != 0 && !slices.Contains(taken, want) {
		l, err := net.Listen("tcp", local(want))
		if err == nil {
			return want, l.Close()
		}
		free, ferr := stack.FreePort()
		if ferr != nil {
			return 0, ferr
		}
		why := root(err)
		d.screen.print(fmt.Sprintf("port %d for %s cannot be had (%v): taking %d", want, what, why, free))
		return free, nil
	}
	return stack.FreePort()
}

func root(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}

// shown is a path as one would type it in the demo's terminal.
func (d *demo) shown(path string) string {
	if rel, err := filepath.Rel(d.work, path); err == nil && !strings.HasPrefix(rel, "..") {
		return rel
	}
	return path
}

// step does something under a line of progress.
func (d *demo) step(what string, do func() error) error {
	done := d.screen.step(what)
	err := do()
	done()
	return err
}

func (d *demo) start(ctx context.Context) error {
	d.screen.print("Everything of this demo is in " + d.shown(d.dir) + ", its logs in " + d.logs())
	what := "starting the control plane"
	if d.kubeconfig != "" {
		what = "preparing the cluster of " + d.kubeconfig
	}
	if err := d.step(what, func() error {
		if d.kubeconfig != "" {
			if _, err := d.stack.Kubectl(ctx, "get", "--raw", "/readyz", "--request-timeout=10s"); err != nil {
				return fmt.Errorf("the cluster of --kubeconfig %s does not answer: %w", d.kubeconfig, err)
			}
			d.touched = true
		}
		return d.stack.StartCluster(ctx)
	}); err != nil {
		return err
	}
	d.started = true
	if err := d.wrapper(); err != nil {
		return err
	}
	if d.kubeconfig != "" {
		// The folder may hold a token of another cluster.
		if _, err := d.stack.Token(ctx, edgeNode); err != nil {
			return err
		}
	}
	if err := d.step("starting the container runtime", d.runtime); err != nil {
		return err
	}
	for _, p := range []struct{ what, part string }{
		{"starting the cloud broker and its bridge", "cloud"},
		{"starting the pump station", "station"},
		{"starting the edge node " + edgeNode, "edge"},
		{"starting the mapper", "mapper"},
	} {
		part, ok := d.parts[p.part]
		if !ok {
			continue // the mapper is a pod, see below
		}
		if err := d.step(p.what, func() error { return d.up(ctx, part) }); err != nil {
			return err
		}
	}
	if err := d.step("creating the device", func() error { return d.objects(ctx) }); err != nil {
		return err
	}
	if d.at.pods {
		if err := d.step("deploying the mapper as a container", func() error { return d.deploy(ctx) }); err != nil {
			return err
		}
	}
	d.bus.start(ctx)
	return d.step("waiting for the first values", func() error {
		if err := d.bus.wait(ctx, 90*time.Second); err != nil {
			return err
		}
		_, err := d.stack.Kubectl(ctx, "wait", "--for=condition=Ready", "device/"+pump, "--timeout=60s")
		return err
	})
}

// wrapper writes DIR/kubectl, which knows the demo's cluster.
func (d *demo) wrapper() error {
	script := fmt.Sprintf("#!/bin/sh\n# kubectl on the demo's cluster, made by fairlead-demo.\nexec %s --kubeconfig %s \"$@\"\n", quote(filepath.Join(d.bin, "kubectl")), quote(d.stack.Kubeconfig))
	path := filepath.Join(d.dir, "kubectl")
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		return err
	}
	return os.Chmod(path, 0o700) // one that was there keeps its mode
}

// objects creates what is not there yet, so that a second run keeps what was
// changed in the first one.
func (d *demo) objects(ctx context.Context) error {
	b, err := os.ReadFile(filepath.Join(d.repo, sample))
	if err != nil {
		return err
	}
	for doc := range bytes.SplitSeq(b, []byte("\n---\n")) {
		var o map[string]any
		if err := yaml.Unmarshal(doc, &o); err != nil {
			return fmt.Errorf("%s: %w", sample, err)
		}
		if o["kind"] == "Device" {
			if err := d.device(ctx, o); err != nil {
				return err
			}
			continue
		}
		if _, err := d.stack.KubectlIn(ctx, doc, "apply", "--server-side", "--force-conflicts", "-f", "-"); err != nil {
			return fmt.Errorf("%s: %w", sample, err)
		}
	}
	if _, err := d.stack.Kubectl(ctx, "wait", "--for=create", "node/"+edgeNode, "--timeout=60s"); err != nil {
		return fmt.Errorf("the edge did not enrol: %w; see %s", err, d.logs())
	}
	_, err = d.stack.KubectlIn(ctx, objects, "apply", "--server-side", "--force-conflicts", "-f", "-")
	return err
}

// device creates the Device with the address of our pump station, or gives the
// one that is there its new address.
func (d *demo) device(ctx context.Context, o map[string]any) error {
	station := d.parts["station"].address
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"modbus": map[string]any{"address": station}}})
	if err != nil {
		return err
	}
	if out, err := d.stack.Kubectl(ctx, "get", "device", pump, "--ignore-not-found", "-o", "name"); err != nil {
		return err
	} else if len(bytes.TrimSpace(out)) > 0 {
		_, err := d.stack.Kubectl(ctx, "patch", "device", pump, "--type=merge", "-p", string(patch))
		return err
	}
	spec, _ := o["spec"].(map[string]any)
	modbus, _ := spec["modbus"].(map[string]any)
	if modbus == nil {
		return fmt.Errorf("%s: the device has no spec.modbus", sample)
	}
	modbus["address"] = station
	doc, err := json.Marshal(o)
	if err != nil {
		return err
	}
	_, err = d.stack.KubectlIn(ctx, doc, "create", "-f", "-")
	return err
}

// up starts a part and looks after its process.
func (d *demo) up(ctx context.Context, p *part) error {
	process, err := p.start(ctx)
	if err != nil {
		return err
	}
	p.process, p.since, p.stalled = process, time.Time{}, false
	go func() {
		<-process.Done()
		d.died <- death{p.name, process}
	}()
	return os.WriteFile(d.pidFile(p), []byte(strconv.Itoa(process.PID())+"\n"), 0o600)
}

func (d *demo) pidFile(p *part) string {
	name := "fairlead-" + p.name
	if p.name == "station" {
		name = "modbussim"
	}
	return filepath.Join(d.dir, name+".pid")
}

// down kills a part as a power cut would.
func (d *demo) down(p *part) {
	p.since = time.Now()
	p.process.Kill()
	_ = os.Remove(d.pidFile(p))
}

// stall makes the station swallow requests, and answer again.
func (d *demo) stall() string {
	p := d.parts["station"]
	if !p.since.IsZero() {
		return "the pump station is down"
	}
	if err := p.process.Signal(syscall.SIGUSR1); err != nil {
		return err.Error()
	}
	p.stalled = !p.stalled
	if p.stalled {
		return "the pump station answers no more: its values turn bad, with the last ones kept"
	}
	return "the pump station answers again"
}

// stop ends everything.
func (d *demo) stop() {
	d.screen.done()
	done := d.screen.step("stopping")
	d.wg.Wait()
	d.bus.stop()
	if d.started && d.kubeconfig == "" {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_ = d.stack.DropPolicies(ctx) // only spares the next start a wait
		cancel()
	}
	d.stack.Stop()
	for _, p := range d.parts {
		_ = os.Remove(d.pidFile(p))
	}
	done()
	line := "stopped; the data stays in " + d.shown(d.dir) + " for the next run"
	if d.touched {
		line += fmt.Sprintf(". In the cluster stay the definitions and policies of fairlead.dev, node %s with its token, device %s, daemon set modbus-mapper, pod and config map dashboard", edgeNode, pump)
	}
	d.screen.print(line)
}
