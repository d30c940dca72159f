package pods

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/edge/pods/podstatus"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const (
	labelNamespace = "io.kubernetes.pod.namespace"
	labelName      = "io.kubernetes.pod.name"
	labelUID       = "io.kubernetes.pod.uid"
	labelContainer = "io.kubernetes.container.name"
	// labelNode marks the sandboxes and containers that are this agent's: it never
	// touches others, such as those of a kubelet on the same runtime.
	labelNode = "fairlead.dev/node"

	// relistEvery is how often the runtime is asked what there is although its
	// events should have said it; relistBlind where it has none.
	relistEvery = time.Minute
	relistBlind = time.Second
	// observeEvery is how often, at most, the node as a whole is looked at where
	// nothing has happened: more than what runs, and it costs more.
	observeEvery = 5 * time.Second
	// lookTimeout is how long the runtime has to answer when it is looked at as a
	// whole: one that hangs is to be seen in the node's conditions soon.
	lookTimeout = 30 * time.Second
)

// seen is what the runtime has of a pod.
type seen struct {
	sandboxes  []*runtimeapi.PodSandboxStatus // newest first
	containers []podstatus.Container          // newest first
}

// look asks the runtime what it has of a pod.
func (p *pod) look(ctx context.Context) (*seen, error) {
	mine := map[string]string{labelUID: string(p.uid), labelNode: p.e.cfg.Node}
	sandboxes, err := p.e.cri.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{LabelSelector: mine})
	if err != nil {
		return nil, fmt.Errorf("list the sandboxes: %w", err)
	}
	containers, err := p.e.cri.ListContainers(ctx, &runtimeapi.ContainerFilter{LabelSelector: mine})
	if err != nil {
		return nil, fmt.Errorf("list the containers: %w", err)
	}
	s := &seen{}
	// Their ids first: what changes from now on is heard of.
	ids := make([]string, 0, len(sandboxes)+len(containers))
	for _, x := range sandboxes {
		ids = append(ids, x.Id)
	}
	for _, x := range containers {
		ids = append(ids, x.Id)
	}
	p.e.learn(p, ids)
	for _, x := range sandboxes {
		st, err := p.e.cri.PodSandboxStatus(ctx, x.Id)
		if cri.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("status of sandbox %.12s: %w", x.Id, err)
		}
		s.sandboxes = append(s.sandboxes, st)
	}
	dead := map[string]podstatus.Container{}
	for _, x := range containers {
		c, ok := p.dead[x.Id]
		if !ok {
			st, err := p.e.cri.ContainerStatus(ctx, x.Id)
			if cri.IsNotFound(err) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("status of container %.12s: %w", x.Id, err)
			}
			c = podstatus.FromRuntime(st, x.PodSandboxId, logTail)
		}
		if c.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			dead[x.Id] = c // it never changes again
		}
		s.containers = append(s.containers, c)
	}
	p.dead = dead
	slices.SortStableFunc(s.sandboxes, func(a, b *runtimeapi.PodSandboxStatus) int { return cmp.Compare(b.CreatedAt, a.CreatedAt) })
	slices.SortStableFunc(s.containers, func(a, b podstatus.Container) int { return b.Created.Compare(a.Created) })
	return s, nil
}

// ready tells whether a sandbox is alive.
func ready(s *runtimeapi.PodSandboxStatus) bool {
	return s.GetState() == runtimeapi.PodSandboxState_SANDBOX_READY
}

// ips are the addresses of the newest sandbox if it is ready, the primary one first.
func (s *seen) ips() []string {
	if len(s.sandboxes) == 0 || !ready(s.sandboxes[0]) {
		return nil
	}
	return sandboxIPs(s.sandboxes[0])
}

func sandboxIPs(b *runtimeapi.PodSandboxStatus) []string {
	n := b.GetNetwork()
	if n.GetIp() == "" {
		return nil
	}
	out := []string{n.Ip}
	for _, a := range n.AdditionalIps {
		out = append(out, a.Ip)
	}
	return out
}

// running lists the containers that run.
func (s *seen) running() []podstatus.Container {
	var out []podstatus.Container
	for _, c := range s.containers {
		if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			out = append(out, c)
		}
	}
	return out
}

// latest is the newest container of a name.
func (s *seen) latest(name string) (podstatus.Container, bool) {
	for _, c := range s.containers {
		if c.Name == name {
			return c, true
		}
	}
	return podstatus.Container{}, false
}

// logTail gives the end of a container's log, as its program wrote it.
func logTail(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	// Each line of the file begins with a time stamp, the stream and a tag.
	const most = 4*podstatus.MaxLogMessage + 64*podstatus.MaxLogLines
	if n := st.Size(); n > most {
		if _, err := f.Seek(n-most, io.SeekStart); err != nil {
			return "", err
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return "", err
	}
	lines := strings.SplitAfter(string(b), "\n")
	if int64(len(b)) < st.Size() {
		lines = lines[1:] // the first is cut
	}
	var out []string
	for _, l := range lines {
		parts := strings.SplitN(l, " ", 4)
		if len(parts) < 4 {
			continue
		}
		text := parts[3]
		if parts[2] == "P" {
			text = strings.TrimSuffix(text, "\n")
		}
		out = append(out, text)
	}
	return strings.Join(out[max(0, len(out)-podstatus.MaxLogLines):], ""), nil
}

// learn remembers whose containers these are, for the runtime's events.
func (e *Engine) learn(p *pod, ids []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, id := range p.ids {
		delete(e.mu.ids, id)
	}
	for _, id := range ids {
		e.mu.ids[id] = p.uid
	}
	p.ids = ids
}

// runtimeChanged hears of a change of a container or sandbox; an empty id is a
// runtime that came back.
func (e *Engine) runtimeChanged(id string) {
	if id == "" {
		e.askRelist()
		return
	}
	e.mu.Lock()
	uid, ok := e.mu.ids[id]
	p := e.mu.pods[uid]
	e.mu.Unlock()
	if ok && p != nil {
		p.wake()
	}
}

func (e *Engine) askRelist() {
	select {
	case e.relistNow <- struct{}{}:
	default:
	}
}

// relist compares what the runtime has with what was known, wakes the pods where
// something differs and takes care of what belongs to no pod.
func (e *Engine) relist(ctx context.Context) error {
	mine := map[string]string{labelNode: e.cfg.Node}
	sandboxes, err := e.cri.ListPodSandbox(ctx, nil) // others' too: their logs may be in the same folder
	if err != nil {
		return fmt.Errorf("list the sandboxes: %w", err)
	}
	containers, err := e.cri.ListContainers(ctx, &runtimeapi.ContainerFilter{LabelSelector: mine})
	if err != nil {
		return fmt.Errorf("list the containers: %w", err)
	}
	spared := map[types.UID]bool{}
	found := map[types.UID][]string{}
	orphans := map[types.UID]*orphan{}
	note := func(labels map[string]string, id, state string) {
		uid := types.UID(labels[labelUID])
		found[uid] = append(found[uid], id+state)
		if e.lookup(uid) == nil {
			if orphans[uid] == nil {
				orphans[uid] = &orphan{uid: uid, namespace: labels[labelNamespace], name: labels[labelName]}
			}
		}
	}
	for _, s := range sandboxes {
		if s.Labels[labelNode] != e.cfg.Node {
			spared[types.UID(s.GetMetadata().GetUid())] = true
			continue
		}
		note(s.Labels, s.Id, s.State.String())
	}
	for _, c := range containers {
		note(c.Labels, c.Id, c.State.String())
	}
	prints := map[types.UID]string{}
	for uid, parts := range found {
		slices.Sort(parts)
		prints[uid] = strings.Join(parts, " ")
	}
	for _, p := range e.all() {
		if prints[p.uid] != e.prints[p.uid] {
			p.wake()
		}
	}
	e.prints = prints
	if err := e.traces(orphans); err != nil {
		return err
	}
	for uid, o := range orphans {
		if e.described(o) {
			spared[uid] = true
			delete(orphans, uid)
		}
	}
	e.spared.Store(&spared)
	return e.adopt(ctx, orphans)
}

// described tells whether the bus has a description of what looks like an orphan:
// one that cannot be read, or that has only just come.
func (e *Engine) described(o *orphan) bool {
	if o.name == "" {
		return false
	}
	b, ok := e.bus.Retained(topic.DesiredPod(e.cfg.Node, o.namespace, o.name))
	if !ok {
		return false
	}
	pod, _, err := decodePod(b)
	return err != nil || pod.UID == o.uid
}

// orphan is something in the runtime or on the disk that belongs to no pod: its
// pod was deleted while nobody looked.
type orphan struct {
	uid             types.UID
	namespace, name string
}

// adopt makes pods of orphans, which nobody wants: their end is that of others.
func (e *Engine) adopt(ctx context.Context, orphans map[types.UID]*orphan) error {
	if len(orphans) == 0 || !e.settled() {
		return nil
	}
	var errs []error
	for _, o := range orphans {
		spec, err := e.restore(ctx, o)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		e.log.Info("a pod that nobody wants is ended", "pod", spec.Namespace+"/"+spec.Name, "uid", o.uid)
		e.mu.Lock()
		p, ok := e.mu.pods[o.uid]
		if !ok {
			p = e.newPodLocked(spec, false)
			p.mu.wanted = false
		}
		e.mu.Unlock()
		if !ok {
			p.wake()
		}
	}
	return errors.Join(errs...)
}
