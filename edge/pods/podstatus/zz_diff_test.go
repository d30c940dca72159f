package podstatus

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type dProbe struct{ Startup, Readiness, Liveness int } // 0 unknown 1 ok 2 fail
type dSandbox struct {
	ID      string
	Attempt uint32
	Ready   bool
	IP      string
	Host    bool
}
type dCase struct {
	Pod        *corev1.Pod
	Gates      map[string]string
	Previous   corev1.PodStatus
	Sandboxes  []dSandbox
	Containers []Container
	Changed    map[string]bool
	Waiting    map[string]Waiting
	Probes     map[string]dProbe
	Stopped    bool
	Now        time.Time
}
type dOut struct {
	Status  corev1.PodStatus
	Final   *corev1.PodStatus
	Actions dActions
}
type dActions struct {
	KillPod, CreateSandbox bool
	Attempt                uint32
	SandboxID              string
	Init, Regular, Eph     []string
	Kill                   []string
	Reset                  []string
}

type dProbes map[string]dProbe

func (p dProbes) Started(id string) (bool, bool) { return p[id].Startup == 1, p[id].Startup != 0 }
func (p dProbes) Ready(id string) (bool, bool)   { return p[id].Readiness == 1, p[id].Readiness != 0 }
func (p dProbes) Failed(id string) string {
	switch {
	case p[id].Liveness == 2:
		return LivenessProbe
	case p[id].Startup == 2:
		return StartupProbe
	}
	return ""
}

func (c *dCase) input() Input {
	in := Input{Pod: c.Pod, Previous: c.Previous, Containers: c.Containers, Runtime: "containerd", Waiting: c.Waiting, Probes: dProbes(c.Probes),
		Stopped: c.Stopped, Now: c.Now, QOS: qosOf(c.Pod), HostIPs: []string{"192.0.2.1"},
		Hash:  func(k *corev1.Container) string { return k.Name },
		Gates: map[corev1.PodConditionType]corev1.ConditionStatus{}}
	for k, v := range c.Gates {
		in.Gates[corev1.PodConditionType(k)] = corev1.ConditionStatus(v)
	}
	in.Containers = slices.Clone(c.Containers)
	for i := range in.Containers {
		in.Containers[i].Hash = in.Containers[i].Name
		if c.Changed[in.Containers[i].ID] {
			in.Containers[i].Hash = "other"
		}
	}
	for _, s := range c.Sandboxes {
		x := &runtimeapi.PodSandboxStatus{Id: s.ID, Metadata: &runtimeapi.PodSandboxMetadata{Attempt: s.Attempt}, State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY,
			Network: &runtimeapi.PodSandboxNetworkStatus{Ip: s.IP}, Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: &runtimeapi.NamespaceOption{}}}}
		if s.Ready {
			x.State = runtimeapi.PodSandboxState_SANDBOX_READY
		}
		if s.Host {
			x.Linux.Namespaces.Options.Network = runtimeapi.NamespaceMode_NODE
		}
		in.Sandboxes = append(in.Sandboxes, x)
	}
	return in
}

func qosOf(*corev1.Pod) corev1.PodQOSClass { return "" }

func pick[T any](r *rand.Rand, xs ...T) T { return xs[r.IntN(len(xs))] }

func randContainer(r *rand.Rand, name string, initial bool) corev1.Container {
	c := corev1.Container{Name: name, Image: "fairlead.test/" + name + ":1"}
	switch r.IntN(6) {
	case 0:
		c.RestartPolicy = new(pick(r, corev1.ContainerRestartPolicyNever, corev1.ContainerRestartPolicyOnFailure, corev1.ContainerRestartPolicyAlways))
	}
	if initial && r.IntN(2) == 0 {
		c.RestartPolicy = new(corev1.ContainerRestartPolicyAlways)
	}
	if c.RestartPolicy != nil && !(initial && Sidecar(&c)) && r.IntN(2) == 0 {
		c.RestartPolicyRules = append(c.RestartPolicyRules, corev1.ContainerRestartRule{
			Action:    pick(r, corev1.ContainerRestartRuleActionRestart, corev1.ContainerRestartRuleActionRestartAllContainers),
			ExitCodes: &corev1.ContainerRestartRuleOnExitCodes{Operator: pick(r, corev1.ContainerRestartRuleOnExitCodesOpIn, corev1.ContainerRestartRuleOnExitCodesOpNotIn), Values: []int32{42, 1}[:1+r.IntN(2)]},
		})
	}
	p := func() *corev1.Probe {
		return &corev1.Probe{PeriodSeconds: 100000, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}}
	}
	if !initial || Sidecar(&c) {
		if r.IntN(3) == 0 {
			c.StartupProbe = p()
		}
		if r.IntN(3) == 0 {
			c.ReadinessProbe = p()
		}
		if r.IntN(3) == 0 {
			c.LivenessProbe = p()
		}
	}
	if r.IntN(3) == 0 {
		c.VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/v", ReadOnly: r.IntN(2) == 0}}
	}
	if r.IntN(3) == 0 {
		c.Resources.Requests = corev1.ResourceList{"cpu": resource.MustParse("100m"), "memory": resource.MustParse("20Mi")}
		if r.IntN(2) == 0 {
			c.Resources.Limits = corev1.ResourceList{"cpu": resource.MustParse("200m"), "memory": resource.MustParse("20Mi")}
		}
	}
	return c
}

func walk(r *rand.Rand, seed int) (cases []dCase) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "default", UID: "u", Generation: 3}}
	pod.Spec.RestartPolicy = pick(r, corev1.RestartPolicyAlways, corev1.RestartPolicyOnFailure, corev1.RestartPolicyNever)
	for i := range pick(r, 0, 0, 1, 2, 3) {
		pod.Spec.InitContainers = append(pod.Spec.InitContainers, randContainer(r, fmt.Sprintf("i%d", i), true))
	}
	for i := range pick(r, 1, 1, 2, 3) {
		pod.Spec.Containers = append(pod.Spec.Containers, randContainer(r, fmt.Sprintf("c%d", 3-i), false))
	}
	if r.IntN(4) == 0 {
		pod.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "e", Image: "fairlead.test/e:1"}}}
	}
	if r.IntN(4) == 0 {
		pod.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "x.test/a"}, {ConditionType: "x.test/b"}}
	}
	gates := map[string]string{}
	if r.IntN(2) == 0 {
		gates["x.test/a"] = pick(r, "True", "False")
		gates["x.test/b"] = "True"
	}
	host := r.IntN(8) == 0
	pod.Spec.HostNetwork = host
	now := time.Date(2035, 1, 1, 0, 0, 0, 0, time.UTC)
	var prev corev1.PodStatus
	var boxes []dSandbox
	var cs []Container
	changed := map[string]bool{}
	probes := map[string]dProbe{}
	n := 0
	for step := range 8 {
		now = now.Add(10 * time.Second)
		waiting := map[string]Waiting{}
		// the world moves on
		for i := range cs {
			if cs[i].State == runtimeapi.ContainerState_CONTAINER_RUNNING {
				switch r.IntN(7) {
				case 0, 1:
					cs[i].State, cs[i].Finished, cs[i].ExitCode = runtimeapi.ContainerState_CONTAINER_EXITED, now, pick[int32](r, 0, 0, 1, 42, 137)
					cs[i].Reason = "Error"
					if cs[i].ExitCode == 0 {
						cs[i].Reason = "Completed"
					}
					if cs[i].ExitCode == 137 {
						cs[i].Reason = "OOMKilled"
					}
				case 2:
					if r.IntN(4) == 0 && os.Getenv("FL_UNKNOWN") != "" {
						cs[i].State = runtimeapi.ContainerState_CONTAINER_UNKNOWN
					}
				case 3:
					if r.IntN(4) == 0 {
						changed[cs[i].ID] = true
					}
				}
			}
			spec := specOf(pod, cs[i].Name)
			p := dProbe{}
			if spec != nil && spec.StartupProbe != nil {
				p.Startup = pick(r, 1, 1, 1, 2, 3)
			}
			if spec != nil && spec.ReadinessProbe != nil {
				p.Readiness = pick(r, 1, 2)
			}
			if spec != nil && spec.LivenessProbe != nil {
				p.Liveness = pick(r, 1, 1, 1, 2)
				if p.Startup > 1 {
					p.Liveness = 1
				}
			}
			probes[cs[i].ID] = p
		}
		if r.IntN(12) == 0 && len(cs) > 0 {
			i := r.IntN(len(cs))
			cs = slices.Delete(slices.Clone(cs), i, i+1)
		}
		if r.IntN(15) == 0 {
			for i := range boxes {
				boxes[i].Ready = false
				for j := range cs {
					if cs[j].State != runtimeapi.ContainerState_CONTAINER_EXITED {
						cs[j].State, cs[j].ExitCode, cs[j].Reason, cs[j].Finished = runtimeapi.ContainerState_CONTAINER_EXITED, 255, "Unknown", now
					}
				}
			}
		}
		for _, l := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers, ephemeralContainers(pod)} {
			for _, c := range l {
				if r.IntN(3) == 0 {
					waiting[c.Name] = Waiting{pick(r, "CrashLoopBackOff", "ErrImagePull"), "because"}
				}
			}
		}
		c := dCase{Pod: pod.DeepCopy(), Gates: gates, Previous: *prev.DeepCopy(), Sandboxes: slices.Clone(boxes), Containers: slices.Clone(cs), Changed: map[string]bool{}, Waiting: waiting, Probes: map[string]dProbe{}, Now: now}
		for k, v := range changed {
			c.Changed[k] = v
		}
		for k, v := range probes {
			c.Probes[k] = v
		}
		if step == 7 && r.IntN(2) == 0 {
			t := metav1.NewTime(now)
			c.Pod.DeletionTimestamp = &t
		}
		if step == 7 && r.IntN(2) == 0 {
			c.Stopped = true
			c.Waiting = nil
			for i := range c.Containers {
				if s := &c.Containers[i]; s.State != runtimeapi.ContainerState_CONTAINER_EXITED {
					s.State, s.ExitCode, s.Reason, s.Finished = runtimeapi.ContainerState_CONTAINER_EXITED, 143, "Error", now
				}
			}
			for i := range c.Sandboxes {
				c.Sandboxes[i].Ready = false
			}
		}
		cases = append(cases, c)
		in := c.input()
		s, terminal := Compute(in)
		a := Next(in, s)
		prev = *s.DeepCopy()
		if terminal {
			in2 := in
			in2.Stopped = true
			_ = in2
		}
		// the engine acts, more or less
		if r.IntN(4) == 0 {
			continue
		}
		for _, k := range a.Reset {
			cs = slices.DeleteFunc(slices.Clone(cs), func(x Container) bool { return x.ID == k.ID })
		}
		if a.KillPod {
			for i := range boxes {
				boxes[i].Ready = false
			}
			for i := range cs {
				if cs[i].State != runtimeapi.ContainerState_CONTAINER_EXITED {
					cs[i].State, cs[i].ExitCode, cs[i].Reason, cs[i].Finished = runtimeapi.ContainerState_CONTAINER_EXITED, 143, "Error", now
				}
			}
		}
		for _, id := range a.Prune {
			cs = slices.DeleteFunc(slices.Clone(cs), func(x Container) bool { return x.ID == id })
		}
		for _, k := range a.Kill {
			for i := range cs {
				if cs[i].ID == k.ID {
					cs[i].State, cs[i].ExitCode, cs[i].Reason, cs[i].Finished = runtimeapi.ContainerState_CONTAINER_EXITED, 143, "Error", now
				}
			}
		}
		if a.CreateSandbox {
			n++
			boxes = append([]dSandbox{{ID: fmt.Sprintf("s%d", n), Attempt: a.Attempt, Ready: true, IP: "10.0.0.9", Host: host}}, boxes...)
			if host {
				boxes[0].IP = ""
			}
		}
		if len(boxes) == 0 || !boxes[0].Ready {
			continue
		}
		var start []*corev1.Container
		start = append(append(start, a.StartInit...), a.Start...)
		for _, e := range a.StartEphemeral {
			start = append(start, (*corev1.Container)(&e.EphemeralContainerCommon))
		}
		for _, k := range start {
			if r.IntN(5) == 0 {
				continue
			}
			n++
			in.Previous = prev
			in.Containers = cs
			state := runtimeapi.ContainerState_CONTAINER_RUNNING
			if r.IntN(15) == 0 {
				state = runtimeapi.ContainerState_CONTAINER_CREATED
			}
			x := Container{Name: k.Name, ID: fmt.Sprintf("x%d", n), SandboxID: boxes[0].ID, State: state, Created: now.Add(time.Duration(n) * time.Millisecond), Started: now.Add(time.Second),
				Image: k.Image, ImageRef: "sha256:" + k.Name, Restarts: Attempt(in, k.Name)}
			if state == runtimeapi.ContainerState_CONTAINER_CREATED {
				x.Started = time.Time{}
			}
			cs = append([]Container{x}, cs...)
			if k.StartupProbe != nil || k.ReadinessProbe != nil || k.LivenessProbe != nil {
				probes[x.ID] = dProbe{Startup: b2i(k.StartupProbe != nil) * 3, Readiness: b2i(k.ReadinessProbe != nil) * 2, Liveness: b2i(k.LivenessProbe != nil)}
			}
		}
	}
	return cases
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func specOf(pod *corev1.Pod, name string) *corev1.Container {
	for _, l := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range l {
			if l[i].Name == name {
				return &l[i]
			}
		}
	}
	return nil
}

func TestZZWrite(t *testing.T) {
	dir := os.Getenv("FL_DIFF")
	if dir == "" {
		t.Skip()
	}
	r := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
	var all []dCase
	for i := range 1500 {
		all = append(all, walk(r, i)...)
	}
	b, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/cases.json", b, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Log(len(all), len(b))
}

func names(cs []*corev1.Container) (l []string) {
	for _, c := range cs {
		l = append(l, c.Name)
	}
	return l
}

func TestZZCompare(t *testing.T) {
	dir := os.Getenv("FL_DIFF")
	if dir == "" {
		t.Skip()
	}
	read := func(name string, v any) {
		b, err := os.ReadFile(dir + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatal(err)
		}
	}
	var cases []dCase
	var want, acts []dOut
	read("cases.json", &cases)
	read("status.json", &want)
	read("actions.json", &acts)
	bad := map[string]int{}
	for i := range cases {
		c := &cases[i]
		in := c.input()
		s, terminal := Compute(in)
		diff := func(what string, got, want any) {
			g, _ := json.Marshal(got)
			w, _ := json.Marshal(want)
			if string(g) == "{}" {
				g = []byte("null")
			}
			if string(w) == "{}" {
				w = []byte("null")
			}
			if string(g) == string(w) || string(g) == "null" && string(w) == "[]" || string(w) == "null" && string(g) == "[]" {
				return
			}
			bad[what]++
			if bad[what] <= 3 && (os.Getenv("FL_ONLY") == "" || os.Getenv("FL_ONLY") == what) {
				old, _ := json.Marshal([]any{c.Previous.Phase, c.Previous.InitContainerStatuses, c.Previous.ContainerStatuses})
				sp, _ := json.Marshal(c.Pod.Spec)
				cj, _ := json.Marshal([]any{c.Sandboxes, c.Containers, c.Waiting, c.Probes, c.Stopped, c.Pod.DeletionTimestamp})
				t.Errorf("case %d %s\n got %s\nwant %s\nPREV %s\nSPEC %s\n%s", i, what, g, w, old, sp, cj)
			}
		}
		w := want[i].Status
		// stable: the same input with the result as previous
		in2 := c.input()
		in2.Previous = s
		s2, _ := Compute(in2)
		_ = reflect.DeepEqual
		diff("stable", s2, s)
		if c.Stopped {
			if want[i].Final == nil {
				bad["aborted"]++
				continue
			}
			w = *want[i].Final
		} else {
			diff("conditions", conds(s.Conditions), conds(w.Conditions))
		}
		if terminalPhase(w.Phase) != terminal {
			diff("terminal", terminal, w.Phase)
		} else if terminalPhase(w.Phase) && s.Phase != w.Phase && !terminalPhase(s.Phase) {
			// held back
		} else {
			diff("phase", s.Phase, w.Phase)
			diff("reason", s.Reason, w.Reason)
		}
		for _, l := range [][]corev1.ContainerStatus{s.ContainerStatuses, s.InitContainerStatuses, w.ContainerStatuses, w.InitContainerStatuses, s.EphemeralContainerStatuses, w.EphemeralContainerStatuses} {
			for k := range l {
				if in.latest(l[k].Name) == nil && l[k].State.Waiting != nil {
					l[k].ContainerID, l[k].ImageID, l[k].Resources, l[k].AllocatedResources = "", "", nil, nil
				}
			}
		}
		diff("containers", s.ContainerStatuses, w.ContainerStatuses)
		diff("init", s.InitContainerStatuses, w.InitContainerStatuses)
		diff("ephemeral", s.EphemeralContainerStatuses, w.EphemeralContainerStatuses)
		if !c.Pod.Spec.HostNetwork {
			diff("ips", s.PodIPs, w.PodIPs)
		}
		if c.Previous.Phase != corev1.PodRunning && s.Phase != corev1.PodRunning {
			diff("resources", s.Resources, w.Resources)
		}
		diff("allocated", s.AllocatedResources, w.AllocatedResources)
		if c.Stopped || c.Pod.DeletionTimestamp != nil || terminal {
			continue
		}
		a := Next(in, s)
		g := dActions{KillPod: a.KillPod, CreateSandbox: a.CreateSandbox, Attempt: a.Attempt, SandboxID: a.SandboxID, Init: names(a.StartInit), Regular: names(a.Start)}
		for _, e := range a.StartEphemeral {
			g.Eph = append(g.Eph, e.Name)
		}
		for _, k := range a.Kill {
			g.Kill = append(g.Kill, k.ID+" "+k.Container.Name+" "+string(k.Reason)+" "+k.Message)
		}
		slices.Sort(g.Kill)
		for _, k := range a.Reset {
			g.Reset = append(g.Reset, fmt.Sprint(k.ID, k.Kill))
		}
		wa := acts[i].Actions
		if wa.KillPod && !wa.CreateSandbox {
			wa.Kill, wa.Init, wa.Eph, g.Kill, g.Init, g.Eph = nil, nil, nil, nil, nil, nil
		}
		if len(c.Sandboxes) == 0 {
			wa.KillPod, g.KillPod = false, false
		}
		for k := range wa.Kill {
			wa.Kill[k] = strings.Replace(wa.Kill[k], " Unknown ", "  ", 1)
		}
		if len(g.Reset) > 0 {
			wa.KillPod, wa.CreateSandbox, wa.Attempt = g.KillPod, g.CreateSandbox, g.Attempt
		}
		diff("actions", g, wa)
	}
	t.Log(len(cases), bad)
}

func conds(l []corev1.PodCondition) []corev1.PodCondition {
	var out []corev1.PodCondition
	for _, c := range l {
		if strings.HasPrefix(string(c.Type), "x.test/") {
			continue
		}
		c.LastTransitionTime = metav1.Time{}
		out = append(out, c)
	}
	return out
}
