package pods

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/yaml"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/topic"
	"github.com/fairlead-io/fairlead/tools/stack"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

var (
	churnOps  = flag.Int("churn", 200, "operations of TestChurn")
	churnSeed = flag.Uint64("seed", 0, "seed of TestChurn; 0 takes the clock's")
)

// otherImage is what updates change a pod's image to.
const otherImage = "fairlead.test/busybox:2"

// churner does random things to pods of the agent's node.
type churner struct {
	*side
	rnd *rand.Rand
	// images are the images that each pod should have got, by UID.
	images map[string][]string
	names  []string // of the pods that Kubernetes has
	made   int
}

// TestChurn creates, changes and deletes pods in no order and kills the agent
// again and again. Afterwards the runtime, the machine, the bus and Kubernetes
// must agree, nothing may be left of what is gone, and nothing may have been
// started more often than it was asked for.
func TestChurn(t *testing.T) {
	s := onlyAgent(t, "churn")
	seed := *churnSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("%d operations with -seed %d", *churnOps, seed)
	files, err := testruntime.BusyboxFiles()
	if err != nil {
		t.Fatal(err)
	}
	archive, err := testruntime.Image(otherImage, files, testruntime.Config{Env: []string{"PATH=/bin"}, Labels: map[string]string{"name": otherImage}})
	if err == nil {
		err = s.node.rt.Import(archive)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: conf}\ndata: {k: v}\n")
	c := &churner{side: s, rnd: rand.New(rand.NewPCG(seed, 0)), images: map[string][]string{}}
	kills := 0
	for i := range *churnOps {
		c.operate()
		if c.rnd.IntN(12) == 0 {
			time.Sleep(time.Duration(c.rnd.IntN(800)) * time.Millisecond) // somewhere in the middle of what it does
			s.node.edge.Kill()
			kills++
			if c.rnd.IntN(3) == 0 { // and something happens while it is away
				c.operate()
			}
			s.restartAgent()
		} else {
			time.Sleep(time.Duration(c.rnd.IntN(100)) * time.Millisecond)
		}
		if i%50 == 49 {
			t.Logf("%d operations, %d kills, %d pods", i+1, kills, len(c.names))
		}
	}
	if kills == 0 {
		t.Error("the agent was never killed")
	}
	c.untilRunning(c.names...)
	c.agree(kills)
	c.deleteAll()
	c.names = nil
	c.agree(kills)
}

const churnPods = 12 // at once

func (c *churner) operate() {
	c.Helper()
	n := c.rnd.IntN(10)
	switch {
	case len(c.names) == 0 || n < 4 && len(c.names) < churnPods:
		c.makePod()
	case n < 7:
		c.changeImage(c.names[c.rnd.IntN(len(c.names))])
	default:
		c.drop(c.rnd.IntN(len(c.names)))
	}
}

// makePod makes a pod that notes each start of its container, with its image, in
// a file of the host.
func (c *churner) makePod() {
	c.Helper()
	name := fmt.Sprintf("c%d", c.made)
	c.made++
	if c.made > 3 && c.rnd.IntN(4) == 0 {
		name = fmt.Sprintf("c%d", c.rnd.IntN(c.made-1)) // a name that was there
		if slices.Contains(c.names, name) {
			return
		}
	}
	manifest := fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: NODE
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: fairlead.test/busybox:1
    env: [{name: POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}]
    command: [sh, -c, "trap 'exit 0' TERM; echo started >> /starts/$POD_UID; sleep 1000000 & wait"]
    resources: {requests: {memory: 4Mi}}
    volumeMounts: [{name: starts, mountPath: /starts}, {name: conf, mountPath: /conf}, {name: mem, mountPath: /mem}, {name: conf, mountPath: /one, subPath: k}]
  volumes:
  - {name: starts, hostPath: {path: HOSTDIR, type: Directory}}
  - {name: conf, configMap: {name: conf}}
  - {name: mem, emptyDir: {medium: Memory}}
`, name)
	manifest = strings.NewReplacer("HOSTDIR", c.dir, "NODE", c.node.name).Replace(manifest)
	var p corev1.Pod
	if err := yaml.Unmarshal([]byte(manifest), &p); err != nil {
		c.Fatal(err)
	}
	got, err := kube.CoreV1().Pods(c.ns).Create(c.ctx, &p, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return // the one of this name is still being deleted
	}
	if err != nil {
		c.Fatal(err)
	}
	c.names = append(c.names, name)
	c.images[string(got.UID)] = []string{testruntime.Busybox}
}

// changeImage is the update of a pod that has to restart its container.
func (c *churner) changeImage(name string) {
	c.Helper()
	c.poll("the image of "+name+" changes", func(ctx context.Context) error {
		p, err := kube.CoreV1().Pods(c.ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		image := otherImage
		if p.Spec.Containers[0].Image == otherImage {
			image = testruntime.Busybox
		}
		p.Spec.Containers[0].Image = image
		if p, err = kube.CoreV1().Pods(c.ns).Update(ctx, p, metav1.UpdateOptions{}); err != nil {
			return err
		}
		c.images[string(p.UID)] = append(c.images[string(p.UID)], image)
		return nil
	})
}

func (c *churner) drop(i int) {
	c.Helper()
	name := c.names[i]
	c.names = slices.Delete(c.names, i, i+1)
	var grace *int64
	if c.rnd.IntN(4) == 0 {
		grace = new(int64) // by force
	}
	c.delete(name, grace)
}

// agree waits until everybody has the same pods, and nothing of others is left, after
// so many kills.
func (c *churner) agree(kills int) {
	c.Helper()
	c.poll("all agree", func(ctx context.Context) error {
		l, err := kube.CoreV1().Pods(c.ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		pods := map[string]string{} // UID → name
		for _, p := range l.Items {
			pods[string(p.UID)] = p.Name
		}
		if len(pods) != len(c.names) {
			return fmt.Errorf("Kubernetes has %d pods, want %d", len(pods), len(c.names))
		}
		return errors.Join(c.agreeRuntime(ctx, pods), c.agreeMachine(pods), c.agreeBus(ctx, pods))
	})
	// What was started once too often does not go away by waiting.
	files, err := os.ReadDir(c.dir)
	if err != nil {
		c.Fatal(err)
	}
	again := 0
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(c.dir, f.Name()))
		if err != nil {
			c.Fatal(err)
		}
		if starts, most := strings.Count(string(b), "started\n"), len(c.images[f.Name()]); starts > most {
			again++
			c.Logf("pod %s was started %d times, and asked for %d times", f.Name(), starts, most)
			if starts > most+1 {
				c.Errorf("pod %s was started %d times, and asked for %d times", f.Name(), starts, most)
			}
		}
	}
	// An agent that is killed in the milliseconds in which the runtime starts the
	// process takes its request along: containerd then ends what it has just begun,
	// and the next agent finds a container that has ended, as after a crash. So a
	// kill may cost one start, and not every kill.
	if again > kills/4 {
		c.Errorf("%d pods were started once too often by %d kills", again, kills)
	}
}

// agreeRuntime compares containers and sandboxes with the pods.
func (c *churner) agreeRuntime(ctx context.Context, pods map[string]string) error {
	var errs []error
	containers, err := stack.Containers(ctx, c.node.rt)
	if err != nil {
		return err
	}
	run := map[string]int{}
	for _, o := range containers {
		uid := o.Labels["io.kubernetes.pod.uid"]
		if pods[uid] == "" {
			errs = append(errs, fmt.Errorf("container %s of pod %s, which is gone, is %s", o.Id, uid, o.State))
		} else if o.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			run[uid]++
			if images := c.images[uid]; o.Image.GetUserSpecifiedImage() != images[len(images)-1] && o.Image.GetUserSpecifiedImage() != "" {
				errs = append(errs, fmt.Errorf("pod %s runs image %s, want %s", pods[uid], o.Image.GetUserSpecifiedImage(), images[len(images)-1]))
			}
		}
	}
	sandboxes, err := stack.Sandboxes(ctx, c.node.rt)
	if err != nil {
		return err
	}
	ready := map[string]int{}
	for _, o := range sandboxes {
		uid := o.Labels["io.kubernetes.pod.uid"]
		if pods[uid] == "" {
			errs = append(errs, fmt.Errorf("sandbox %s of pod %s, which is gone, is %s", o.Id, uid, o.State))
		} else if o.State == runtimeapi.PodSandboxState_SANDBOX_READY {
			ready[uid]++
		}
	}
	for uid, name := range pods {
		if run[uid] != 1 || ready[uid] != 1 {
			errs = append(errs, fmt.Errorf("pod %s has %d running containers and %d ready sandboxes", name, run[uid], ready[uid]))
		}
	}
	return errors.Join(errs...)
}

// agreeMachine looks for mounts, folders, cgroups and addresses of pods.
func (c *churner) agreeMachine(pods map[string]string) error {
	var errs []error
	left := func(what, name string) {
		for uid := range pods {
			if strings.Contains(name, uid) {
				return
			}
		}
		errs = append(errs, fmt.Errorf("%s of a pod that is gone: %s", what, name))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], filepath.Join(c.node.data, "pods")+"/") {
			left("mount", f[4])
		}
	}
	for _, dir := range []string{filepath.Join(c.node.data, "pods"), filepath.Join(c.node.rt.Dir, "logs")} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if !e.IsDir() { // the agent's own notes
				continue
			}
			left("folder", filepath.Join(dir, e.Name()))
		}
	}
	err = filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return nil // removed meanwhile
		}
		if d.IsDir() && strings.Contains(path, c.node.rt.Cgroup+"/") && strings.HasPrefix(d.Name(), "pod") {
			left("cgroup", path)
			return filepath.SkipDir
		}
		return nil
	})
	if err != nil {
		return err
	}
	addresses, err := filepath.Glob(filepath.Join(c.node.rt.Dir, "ipam", "*", "10.*"))
	if err != nil {
		return err
	}
	if len(addresses) != len(pods) {
		errs = append(errs, fmt.Errorf("%d addresses are taken by %d pods", len(addresses), len(pods)))
	}
	return errors.Join(errs...)
}

// agreeBus compares what the node and the cloud hold with the pods.
func (c *churner) agreeBus(ctx context.Context, pods map[string]string) error {
	want := map[string]bool{}
	for _, name := range pods {
		want[string(topic.DesiredPod(c.node.name, c.ns, name))] = true
		want[string(topic.ReportedPod(c.node.name, c.ns, name))] = true
	}
	var errs []error
	for where, addr := range map[string]string{"node": c.node.edge.Bus, "cloud": fab.CloudLocal} {
		got, err := retained(ctx, addr, string(topic.NodeAll(c.node.name)))
		if err != nil {
			return err
		}
		for _, t := range slices.Sorted(maps.Keys(got)) {
			if (strings.Contains(t, "/desired/pod/"+c.ns+"/") || strings.Contains(t, "/reported/pod/"+c.ns+"/")) && !want[t] {
				errs = append(errs, fmt.Errorf("%s: retained %s of a pod that is gone: %s", where, t, got[t]))
			}
		}
		for t := range want {
			if got[t] == "" {
				errs = append(errs, fmt.Errorf("%s: no retained %s", where, t))
			}
		}
	}
	return errors.Join(errs...)
}

// retained are the retained messages that a filter selects on a broker: what has
// come until it is quiet.
func retained(ctx context.Context, addr, filter string) (map[string]string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	messages := make(chan client.Message)
	c, err := client.New(client.Config{
		URL: addr, ClientID: fmt.Sprintf("churn-%d", time.Now().UnixNano()),
		Subscriptions: []client.Subscription{{Filter: topic.Filter(filter), QoS: 1}},
		OnMessage: func(m client.Message) {
			select {
			case messages <- m:
			case <-ctx.Done():
			}
		},
	})
	if err != nil {
		return nil, err
	}
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	got := map[string]string{}
	silence := 5 * time.Second // until the first
	for {
		select {
		case m := <-messages:
			got[string(m.Topic)] = string(m.Payload)
			silence = 300 * time.Millisecond
		case <-time.After(silence):
			cancel()
			return got, <-done
		}
	}
}
