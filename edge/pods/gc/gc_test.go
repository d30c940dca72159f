package gc

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/edge/pods/logs"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// parse reads a runtime's containers and sandboxes from lines such as
//
//	s1 pod=a ready
//	c1 pod=a in=s1 name=app exited
//
// each younger than the one before.
func parse(t *testing.T, text string) (in Input) {
	t.Helper()
	for i, line := range strings.Split(strings.TrimSpace(text), "\n") {
		f := strings.Fields(line)
		kv := map[string]string{}
		for _, x := range f[1:] {
			k, v, _ := strings.Cut(x, "=")
			kv[k] = v
		}
		has := func(k string) bool { _, ok := kv[k]; return ok }
		if f[0][0] == 's' {
			s := &runtimeapi.PodSandbox{Id: f[0], Metadata: &runtimeapi.PodSandboxMetadata{Uid: kv["pod"]}, CreatedAt: int64(i), State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY}
			if has("ready") {
				s.State = runtimeapi.PodSandboxState_SANDBOX_READY
			}
			in.Sandboxes = append(in.Sandboxes, s)
			continue
		}
		c := &runtimeapi.Container{Id: f[0], PodSandboxId: kv["in"], Metadata: &runtimeapi.ContainerMetadata{Name: kv["name"]}, CreatedAt: int64(i),
			Labels: map[string]string{labelPodUID: kv["pod"]}}
		switch {
		case has("running"):
			c.State = runtimeapi.ContainerState_CONTAINER_RUNNING
		case has("created"):
			c.State = runtimeapi.ContainerState_CONTAINER_CREATED
		case has("exited"):
			c.State = runtimeapi.ContainerState_CONTAINER_EXITED
		case has("unknown"):
			c.State = runtimeapi.ContainerState_CONTAINER_UNKNOWN
		default:
			t.Fatalf("no state: %s", line)
		}
		in.Containers = append(in.Containers, c)
	}
	return in
}

func TestDecide(t *testing.T) {
	for _, test := range []struct{ name, runtime, gone, want string }{
		{"one dead instance of each container stays", `
			s1 pod=a ready
			c1 pod=a in=s1 name=app exited
			c2 pod=a in=s1 name=side exited
			c3 pod=a in=s1 name=app exited
			c4 pod=a in=s1 name=app exited
			c5 pod=a in=s1 name=side running`, "", "c1 c3"},
		{"a running one is no dead one", `
			s1 pod=a ready
			c1 pod=a in=s1 name=app exited
			c2 pod=a in=s1 name=app running`, "", ""},
		{"containers of the same name in two pods are two", `
			s1 pod=a ready
			c1 pod=a in=s1 name=app exited
			s2 pod=b ready
			c2 pod=b in=s2 name=app exited`, "", ""},
		{"one that is about to start does not take the place of the dead one", `
			s1 pod=a ready
			c1 pod=a in=s1 name=app exited
			c2 pod=a in=s1 name=app exited
			c3 pod=a in=s1 name=app created`, "", "c1"},
		{"one that never started is dead once there is a later one", `
			s1 pod=a ready
			c1 pod=a in=s1 name=app created
			c2 pod=a in=s1 name=app exited
			c3 pod=a in=s1 name=app running`, "", "c1"},
		{"an unknown one counts as dead", `
			s1 pod=a ready
			c1 pod=a in=s1 name=app unknown
			c2 pod=a in=s1 name=app exited`, "", "c1"},
		{"of a pod that is gone nothing stays", `
			s1 pod=a
			c1 pod=a in=s1 name=app exited
			s2 pod=a
			c2 pod=a in=s2 name=app exited
			c3 pod=a in=s2 name=app created`, "a", "c1 c2 c3 s1 s2"},
		{"but what runs, which is for others to stop", `
			s1 pod=a
			c1 pod=a in=s1 name=app exited
			s2 pod=a ready
			c2 pod=a in=s2 name=app running
			s3 pod=b ready`, "a b", "c1 s1"},
		{"the newest sandbox of a living pod stays, dead or not", `
			s1 pod=a
			s2 pod=a
			s3 pod=a`, "", "s1 s2"},
		{"a sandbox with a dead container that stays, stays", `
			s1 pod=a
			c1 pod=a in=s1 name=app exited
			s2 pod=a ready
			c2 pod=a in=s2 name=app running`, "", ""},
		{"and goes with it", `
			s1 pod=a
			c1 pod=a in=s1 name=app exited
			s2 pod=a
			c2 pod=a in=s2 name=app exited
			s3 pod=a ready
			c3 pod=a in=s3 name=app running`, "", "c1 s1"},
		{"an old sandbox that is ready is for others to stop", `
			s1 pod=a ready
			s2 pod=a ready`, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			in := parse(t, test.runtime)
			in.Gone = func(uid types.UID) bool { return slices.Contains(strings.Fields(test.gone), string(uid)) }
			slices.Reverse(in.Containers) // the runtime has no order
			slices.Reverse(in.Sandboxes)
			plan := Decide(in)
			var got []string
			for _, c := range plan.Containers {
				got = append(got, c.Id)
			}
			for _, s := range plan.Sandboxes {
				got = append(got, s.Id)
			}
			if strings.Join(got, " ") != test.want {
				t.Errorf("want %q, got %q", test.want, got)
			}
		})
	}
}

// node is a real runtime with pods as an agent makes them.
type node struct {
	t *testing.T
	*cri.Client
	rt          *testruntime.Runtime
	root, links string
	boxes       map[string]string // pod → newest sandbox
	configs     map[string]*runtimeapi.PodSandboxConfig
	Collector   Collector
	gone        map[types.UID]bool
}

var mine = map[string]string{"fairlead.dev/node": "plant-7"}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, rt: testruntime.Start(t), boxes: map[string]string{}, configs: map[string]*runtimeapi.PodSandboxConfig{}, gone: map[types.UID]bool{}}
	n.root, n.links = filepath.Join(t.TempDir(), "pods"), filepath.Join(t.TempDir(), "containers")
	var err error
	if n.Client, err = cri.Dial(n.rt.Socket, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.Close() })
	n.Collector = Collector{Runtime: n.Client, Labels: mine, LogRoot: n.root, LinkDir: n.links, Gone: func(uid types.UID) bool { return n.gone[uid] }}
	return n
}

// sandbox makes one more sandbox of a pod, whose UID is its name.
func (n *node) sandbox(pod string, attempt uint32, labels map[string]string) string {
	n.t.Helper()
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: pod, Namespace: "default", Uid: pod, Attempt: attempt},
		LogDirectory: logs.PodDir(n.root, "default", pod, types.UID(pod)), Labels: labels,
		Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: n.rt.Cgroup, SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE}}},
	}
	id, err := n.RunPodSandbox(n.t.Context(), cfg, "")
	if err != nil {
		n.t.Fatal(err)
	}
	n.boxes[pod], n.configs[pod] = id, cfg
	return id
}

// container makes and starts a container, and waits for its end unless it stays.
func (n *node) container(pod, name string, attempt uint32, stays bool) string {
	n.t.Helper()
	ctx := n.t.Context()
	dir := filepath.Join(n.configs[pod].LogDirectory, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		n.t.Fatal(err)
	}
	labels := map[string]string{labelPodUID: pod, labelPodName: pod, labelNamespace: "default", labelContainer: name}
	for k, v := range n.configs[pod].Labels {
		labels[k] = v
	}
	cmd := []string{"echo", "hello"}
	if stays {
		cmd = []string{"sleep", "1000000"}
	}
	id, err := n.CreateContainer(ctx, n.boxes[pod], &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name, Attempt: attempt}, Image: &runtimeapi.ImageSpec{Image: testruntime.Busybox}, Command: cmd,
		LogPath: fmt.Sprintf("%s/%d.log", name, attempt), Labels: labels, Linux: &runtimeapi.LinuxContainerConfig{},
	}, n.configs[pod])
	if err == nil {
		err = n.StartContainer(ctx, id)
	}
	if err == nil {
		err = logs.Link(logs.LinkPath(n.links, "default", pod, name, id), filepath.Join(dir, fmt.Sprintf("%d.log", attempt)))
	}
	for !stays && err == nil {
		st, e := n.ContainerStatus(ctx, id)
		if err = e; st.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED {
			break
		}
	}
	if err != nil {
		n.t.Fatal(err)
	}
	return id
}

// want checks which containers, sandboxes, log files and links there are.
func (n *node) want(when string, containers, sandboxes, logFiles []string, links int) {
	n.t.Helper()
	ctx := n.t.Context()
	cs, err := n.ListContainers(ctx, nil)
	ss, err2 := n.ListPodSandbox(ctx, nil)
	if err := errors.Join(err, err2); err != nil {
		n.t.Fatal(err)
	}
	var gotC, gotS, gotL []string
	for _, c := range cs {
		gotC = append(gotC, c.Id)
	}
	for _, s := range ss {
		gotS = append(gotS, s.Id)
	}
	if files, err := filepath.Glob(filepath.Join(n.root, "*", "*", "*")); err == nil {
		for _, f := range files {
			rel, _ := filepath.Rel(n.root, f)
			gotL = append(gotL, rel)
		}
	}
	for _, x := range []struct {
		what      string
		want, got []string
	}{{"containers", containers, gotC}, {"sandboxes", sandboxes, gotS}, {"logs", logFiles, gotL}} {
		slices.Sort(x.want)
		slices.Sort(x.got)
		if !slices.Equal(x.want, x.got) {
			n.t.Errorf("%s: want the %s\n%q, got\n%q", when, x.what, x.want, x.got)
		}
	}
	if got, _ := filepath.Glob(filepath.Join(n.links, "*")); len(got) != links {
		n.t.Errorf("%s: want %d links, got %q", when, links, got)
	}
}

func (n *node) collect() {
	n.t.Helper()
	if err := n.Collector.Collect(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
}

func TestCollect(t *testing.T) {
	n := newNode(t)
	n.collect() // there is nothing yet, no folder either
	ctx := t.Context()
	first := n.sandbox("live", 0, mine)
	n.container("live", "app", 0, false)
	dead := n.container("live", "app", 1, false)
	if err := n.StopPodSandbox(ctx, first); err != nil {
		t.Fatal(err)
	}
	second := n.sandbox("live", 1, mine)
	running := n.container("live", "app", 2, true)
	gone := n.sandbox("gone", 0, mine)
	last := n.container("gone", "app", 0, false)
	other := n.sandbox("gone-elsewhere", 0, nil) // somebody else's
	theirs := n.container("gone-elsewhere", "app", 0, false)
	if err := os.WriteFile(filepath.Join(n.root, "default_live_live", "app", "0.log.20261122-235959.gz"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, x := range []string{gone, other} {
		if err := n.StopPodSandbox(ctx, x); err != nil {
			t.Fatal(err)
		}
	}
	const l1, l2, l3, l4 = "default_live_live/app/1.log", "default_live_live/app/2.log", "default_gone_gone/app/0.log", "default_gone-elsewhere_gone-elsewhere/app/0.log"
	n.collect()
	n.want("all are living", []string{dead, running, last, theirs}, []string{first, second, gone, other}, []string{l1, l2, l3, l4}, 4)

	// What is no log folder of a pod, and no link of ours, stays.
	strange := []string{filepath.Join(n.root, "lost+found"), filepath.Join(n.links, "README")}
	for _, p := range strange {
		if err := os.Mkdir(p, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/nowhere/at/all", filepath.Join(n.links, "dangling.log")); err != nil {
		t.Fatal(err)
	}
	n.gone["gone"], n.gone[""], n.gone["lost+found"] = true, true, true
	n.collect()
	n.want("a pod is gone", []string{dead, running, theirs}, []string{first, second, other}, []string{l1, l2, l4}, 3+2)

	// Somebody else's containers stay, though nobody here knows their pod.
	n.gone["gone-elsewhere"] = true
	n.collect()
	n.want("somebody else's", []string{dead, running, theirs}, []string{first, second, other}, []string{l1, l2}, 2+2)

	// The folder of a pod of which the runtime has nothing any more, with links.
	if err := errors.Join(n.RemovePodSandbox(ctx, other), os.MkdirAll(filepath.Join(n.root, "default_past_past", "app"), 0o700),
		os.Symlink(filepath.Join(n.root, "default_past_past", "app", "0.log"), filepath.Join(n.links, "past.log"))); err != nil {
		t.Fatal(err)
	}
	n.collect() // the log is missing, as it is for a moment when it is rotated
	n.want("a log is missing", []string{dead, running}, []string{first, second}, []string{l1, l2}, 3+2)
	n.gone["past"] = true
	n.collect()
	n.want("another is gone", []string{dead, running}, []string{first, second}, []string{l1, l2}, 2+2)
	for _, p := range strange {
		if _, err := os.Stat(p); err != nil {
			t.Error(err)
		}
	}

	// Room is wanted: a pod that has finished keeps its last words only.
	finished := n.sandbox("finished", 0, mine)
	n.container("finished", "app", 0, false)
	if err := n.StopPodSandbox(ctx, finished); err != nil {
		t.Fatal(err)
	}
	if err := n.Collector.CollectAll(ctx, func(uid types.UID) bool { return uid == "finished" }); err != nil {
		t.Fatal(err)
	}
	n.want("room is wanted", []string{dead, running}, []string{first, second}, []string{l1, l2}, 2+2)
	if _, err := os.Stat(filepath.Join(n.root, "default_finished_finished")); err != nil {
		t.Error("the folder of a pod that is not gone is gone:", err)
	}
}

// TestARemovalThatFails keeps the sandbox, for removing it would remove the
// container by force, and says what failed.
func TestARemovalThatFails(t *testing.T) {
	n := newNode(t)
	box := n.sandbox("gone", 0, mine)
	ct := n.container("gone", "app", 0, false)
	if err := n.StopPodSandbox(t.Context(), box); err != nil {
		t.Fatal(err)
	}
	n.gone["gone"] = true
	// A log that cannot be removed: a folder that is not empty.
	log := filepath.Join(n.root, "default_gone_gone", "app", "0.log")
	if err := errors.Join(os.Remove(log), os.MkdirAll(filepath.Join(log, "x"), 0o700)); err != nil {
		t.Fatal(err)
	}
	err := n.Collector.Collect(t.Context())
	if err == nil || !strings.Contains(err.Error(), "remove container "+ct) || !strings.Contains(err.Error(), "directory not empty") {
		t.Errorf("got %v", err)
	}
	// The folder of a pod that is gone goes as a whole, so the next time it works.
	n.want("after the failure", []string{ct}, []string{box}, nil, 0)
	n.collect()
	n.want("after the next time", nil, nil, nil, 0)
}
