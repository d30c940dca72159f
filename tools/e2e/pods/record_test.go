package pods

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
)

// recorder keeps what Kubernetes gets to see of the pods of one namespace.
type recorder struct {
	normal func(string) string

	mu struct {
		sync.Mutex
		pods    map[string]*podRecord
		events  map[string]bool // lines
		frozen  bool            // see freeze
		latest  time.Time       // of the last change that it kept
		changed chan struct{}   // closed at the next one
		err     error           // of the watches
	}
}

// podRecord is what was seen of a pod of one name.
type podRecord struct {
	now     *corev1.Pod
	gone    bool
	aspects map[string][]string // name → what it was, one after the other
}

// record watches a namespace until ctx ends, and done afterwards is closed.
func record(ctx context.Context, kube kubernetes.Interface, ns string, normal func(string) string) (r *recorder, done <-chan struct{}, err error) {
	r = &recorder{normal: normal}
	r.mu.pods, r.mu.events, r.mu.changed = map[string]*podRecord{}, map[string]bool{}, make(chan struct{})
	pods, err := kube.CoreV1().Pods(ns).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, err
	}
	events, err := kube.CoreV1().Events(ns).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		pods.Stop()
		return nil, nil, err
	}
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		defer pods.Stop()
		defer events.Stop()
		for ctx.Err() == nil {
			var ev watch.Event
			var ok bool
			select {
			case ev, ok = <-pods.ResultChan():
			case ev, ok = <-events.ResultChan():
			}
			if !ok || ev.Type == watch.Error {
				if ctx.Err() == nil {
					r.change(func() bool { r.mu.err = fmt.Errorf("the watch of %s ended: %v", ns, ev.Object); return true })
				}
				return
			}
			switch o := ev.Object.(type) {
			case *corev1.Pod:
				r.change(func() bool { return r.podLocked(o, ev.Type == watch.Deleted) })
			case *corev1.Event:
				if o.InvolvedObject.Kind == "Pod" && ev.Type != watch.Deleted {
					r.change(func() bool { return r.eventLocked(o) })
				}
			}
		}
	}()
	return r, closed, nil
}

// change does something with the record and, where it says true, wakes who waits.
func (r *recorder) change(f func() bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f() {
		r.mu.latest = time.Now()
		close(r.mu.changed)
		r.mu.changed = make(chan struct{})
	}
}

func (r *recorder) podLocked(p *corev1.Pod, deleted bool) (changed bool) {
	rec := r.mu.pods[p.Name]
	if rec == nil {
		rec = &podRecord{aspects: map[string][]string{}}
		r.mu.pods[p.Name] = rec
		changed = true
	}
	if rec.gone && !deleted { // another one of its name
		rec.gone = false
	}
	rec.now = p
	if deleted {
		rec.gone = true
		return true
	}
	if r.mu.frozen {
		return changed
	}
	for name, value := range r.aspects(p) {
		if seen := rec.aspects[name]; len(seen) == 0 || seen[len(seen)-1] != value {
			rec.aspects[name] = append(seen, value)
			changed = true
		}
	}
	return changed
}

// aspects are what is compared of a pod's status.
func (r *recorder) aspects(p *corev1.Pod) map[string]string {
	s := &p.Status
	m := map[string]string{"phase": string(s.Phase)}
	if s.Reason != "" || s.Message != "" {
		m["reason"] = r.normal(s.Reason + ": " + s.Message)
	}
	if s.Phase == corev1.PodPending && s.StartTime == nil {
		return m // nobody has looked at it yet
	}
	m["qos"] = string(s.QOSClass)
	m["start time"] = present(s.StartTime != nil)
	m["host IP"] = present(s.HostIP != "" && len(s.HostIPs) > 0)
	if s.PodIP != "" {
		m["pod IPs"] = r.normal(fmt.Sprint(s.PodIP, len(s.PodIPs)))
	}
	for _, c := range s.Conditions {
		v := string(c.Status)
		if c.Reason != "" || c.Message != "" {
			v += fmt.Sprintf(" (%s: %s)", c.Reason, c.Message)
		}
		m["condition "+string(c.Type)] = r.normal(v)
	}
	for kind, list := range map[string][]corev1.ContainerStatus{"init container ": s.InitContainerStatuses, "container ": s.ContainerStatuses, "ephemeral container ": s.EphemeralContainerStatuses} {
		for _, c := range list {
			m[kind+c.Name] = r.normal(container(&c))
		}
	}
	return m
}

func present(b bool) string {
	if b {
		return "set"
	}
	return "missing"
}

// container is a line about a container.
func container(c *corev1.ContainerStatus) string {
	var b strings.Builder
	b.WriteString(state(&c.State))
	if c.Ready {
		b.WriteString(", ready")
	}
	if c.Started != nil {
		fmt.Fprintf(&b, ", started=%t", *c.Started)
	}
	if c.RestartCount > 0 {
		fmt.Fprintf(&b, ", restarts=%d", c.RestartCount)
	}
	if last := state(&c.LastTerminationState); last != "none" {
		fmt.Fprintf(&b, ", last: %s", last)
	}
	if c.ContainerID != "" {
		fmt.Fprintf(&b, ", id %s", c.ContainerID)
	}
	if c.ImageID != "" {
		fmt.Fprintf(&b, ", image %s %s", c.Image, c.ImageID)
	}
	if c.User != nil && c.User.Linux != nil {
		fmt.Fprintf(&b, ", user %d:%d %v", c.User.Linux.UID, c.User.Linux.GID, c.User.Linux.SupplementalGroups)
	}
	if len(c.AllocatedResources) > 0 {
		fmt.Fprintf(&b, ", allocated %s", resources(c.AllocatedResources))
	}
	if c.Resources != nil {
		fmt.Fprintf(&b, ", requests %s limits %s", resources(c.Resources.Requests), resources(c.Resources.Limits))
	}
	for _, v := range c.VolumeMounts {
		fmt.Fprintf(&b, ", mount %s=%s", v.Name, v.MountPath)
		if v.ReadOnly {
			b.WriteString(" ro")
		}
		if v.RecursiveReadOnly != nil {
			fmt.Fprintf(&b, " recursive=%s", *v.RecursiveReadOnly)
		}
	}
	return b.String()
}

func resources(l corev1.ResourceList) string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(l)) {
		q := l[name]
		out = append(out, string(name)+"="+q.String())
	}
	return "[" + strings.Join(out, " ") + "]"
}

func state(s *corev1.ContainerState) string {
	switch {
	case s.Running != nil:
		return "running"
	case s.Waiting != nil:
		if s.Waiting.Message == "" {
			return fmt.Sprintf("waiting (%s)", s.Waiting.Reason)
		}
		return fmt.Sprintf("waiting (%s: %s)", s.Waiting.Reason, s.Waiting.Message)
	case s.Terminated != nil:
		t := s.Terminated
		v := fmt.Sprintf("terminated (%s, %d", t.Reason, t.ExitCode)
		if t.Signal != 0 {
			v += fmt.Sprintf(", signal %d", t.Signal)
		}
		if t.Message != "" {
			v += fmt.Sprintf(": %q", t.Message)
		}
		return v + ")"
	}
	return "none"
}

func (r *recorder) eventLocked(e *corev1.Event) bool {
	if r.mu.frozen {
		return false
	}
	line := fmt.Sprintf("%s %s", e.Type, e.Reason)
	if e.InvolvedObject.FieldPath != "" {
		line += " " + e.InvolvedObject.FieldPath
	}
	line = r.normal(fmt.Sprintf("%s %s: %s", e.InvolvedObject.Name, line, e.Message))
	if r.mu.events[line] {
		return false
	}
	r.mu.events[line] = true
	return true
}

// pod is the newest that was seen of a pod, nil if there is none, and whether it
// is gone.
func (r *recorder) pod(name string) (p *corev1.Pod, gone bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.mu.pods[name]
	if rec == nil {
		return nil, false
	}
	return rec.now, rec.gone
}

// event tells whether an event with this text in its line was seen.
func (r *recorder) event(text string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for line := range r.mu.events {
		if strings.Contains(line, text) {
			return true
		}
	}
	return false
}

// freeze ends the record: what comes after it depends on when somebody looked,
// as in a crash loop.
func (r *recorder) freeze() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.frozen = true
}

// wait waits until ok; ok is asked after each change.
func (r *recorder) wait(ctx context.Context, ok func() bool) error {
	for {
		r.mu.Lock()
		changed, err := r.mu.changed, r.mu.err
		r.mu.Unlock()
		if err != nil {
			return err
		}
		if ok() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// settle waits until nothing has changed for a while.
func (r *recorder) settle(ctx context.Context, quiet time.Duration) error {
	for {
		r.mu.Lock()
		rest := time.Until(r.mu.latest.Add(quiet))
		r.mu.Unlock()
		if rest <= 0 {
			return nil
		}
		select {
		case <-time.After(rest):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// history is a copy of the record: aspect → what it was, one after the other.
// Events are an aspect each, without an order between them.
func (r *recorder) history() map[string][]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := map[string][]string{}
	for name, rec := range r.mu.pods {
		for a, values := range rec.aspects {
			h[r.normal(name)+" "+a] = slices.Clone(values) // static pods have the node in their name
		}
	}
	for line := range r.mu.events {
		h["event "+line] = []string{"seen"}
	}
	return h
}

// text writes a history for a person.
func text(h map[string][]string) string {
	var b strings.Builder
	for _, a := range slices.Sorted(maps.Keys(h)) {
		if strings.HasPrefix(a, "event ") {
			fmt.Fprintln(&b, a)
			continue
		}
		fmt.Fprintln(&b, a)
		for _, v := range h[a] {
			fmt.Fprintln(&b, "   ", v)
		}
	}
	return b.String()
}

// What differs between two runs of the same pod by its nature.
var normalForms = []struct {
	re *regexp.Regexp
	to string
}{
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`), "UID"},
	{regexp.MustCompile(`sha256:[0-9a-f]{64}`), "DIGEST"},
	{regexp.MustCompile(`\b[0-9a-f]{64}\b`), "ID"},
	{regexp.MustCompile(`10\.96\.\d+\.\d+`), "SERVICE-IP"},
	{regexp.MustCompile(`10\.87\.\d+\.\d+`), "POD-IP"},
	{regexp.MustCompile(`kube-api-access-[a-z0-9]{5}`), "kube-api-access-X"},
	{regexp.MustCompile(`\b([0-9.]+(ms|s))( \([0-9.]+(ms|s) including waiting\))`), "T (T including waiting)"},
	{regexp.MustCompile(`(read|dial) tcp [0-9.:]+->`), "$1 tcp LOCAL->"},
	{regexp.MustCompile(`\bused: [0-9]+`), "used: N"}, // by the cases that run at the time
}

// normalizer makes what two nodes say about the same manifest comparable; names
// are the node's own, by what stands for them.
func normalizer(names map[string]string) func(string) string {
	longest := slices.SortedFunc(maps.Keys(names), func(a, b string) int { return len(b) - len(a) })
	return func(s string) string {
		for _, n := range longest {
			if n != "" {
				s = strings.ReplaceAll(s, n, names[n])
			}
		}
		for _, f := range normalForms {
			s = f.re.ReplaceAllString(s, f.to)
		}
		return s
	}
}
