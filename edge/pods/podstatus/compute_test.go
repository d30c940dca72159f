package podstatus

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	startable  = corev1.PodReadyToStartContainers
	inited     = corev1.PodInitialized
	ready      = corev1.PodReady
	allReady   = corev1.ContainersReady
	disruption = corev1.DisruptionTarget
)

func TestPodComesUp(t *testing.T) {
	s := newStory(corev1.RestartPolicyAlways, []corev1.Container{container("init"), container("mesh", sidecar)}, []corev1.Container{container("b"), container("a")})
	got := s.look()
	checkSummary(t, got, "Pending", "init: waiting(PodInitializing)", "mesh: waiting(PodInitializing)", "a: waiting(PodInitializing)", "b: waiting(PodInitializing)")
	checkConditions(t, got, map[corev1.PodConditionType]string{
		startable: "False PodSandboxNotReady: no pod sandbox exists",
		inited:    "False ContainersNotInitialized: containers with incomplete status: [init mesh]",
		ready:     "False ContainersNotReady: containers with unready status: [mesh b a]", corev1.PodScheduled: "True",
	})
	got = s.sandbox().runs("init").look()
	checkSummary(t, got, "Pending", "init: running started", "mesh: waiting(PodInitializing)", "a: waiting(PodInitializing)", "b: waiting(PodInitializing)")
	checkConditions(t, got, map[corev1.PodConditionType]string{startable: "True"})
	got = s.exits("init", 0).runs("mesh").look()
	checkSummary(t, got, "Pending", "init: Completed(0) ready", "mesh: running started ready", "a: waiting(PodInitializing)", "b: waiting(PodInitializing)")
	checkConditions(t, got, map[corev1.PodConditionType]string{inited: "True"})
	got = s.runs("a", "b").look()
	checkSummary(t, got, "Running", "init: Completed(0) ready", "mesh: running started ready", "a: running started ready", "b: running started ready")
	checkConditions(t, got, map[corev1.PodConditionType]string{inited: "True", ready: "True", allReady: "True"})
	if got.PodIP != "10.0.0.9" || got.HostIP != "192.0.2.1" || !got.StartTime.Time.Equal(t0.Add(10*time.Second)) || got.ObservedGeneration != 2 || got.QOSClass != corev1.PodQOSBestEffort {
		t.Errorf("status %+v", got)
	}
	for c, want := range map[corev1.PodConditionType]int{startable: 20, inited: 30, ready: 40, corev1.PodScheduled: 10} {
		if at := condition(got.Conditions, c).LastTransitionTime; !at.Time.Equal(t0.Add(time.Duration(want) * time.Second)) {
			t.Errorf("%s since %v", c, at)
		}
	}
	if c := got.ContainerStatuses[0]; c.ContainerID != "containerd://a-2" || c.ImageID != "sha256:a" || c.Image != "fairlead.test/a:1" {
		t.Errorf("container %+v", c)
	}
}

// The same input gives the same bytes, whatever the clock says.
func TestUnchangedInputGivesTheSameBytes(t *testing.T) {
	for name, s := range map[string]*story{
		"new":     newStory(corev1.RestartPolicyAlways, []corev1.Container{container("init")}, []corev1.Container{container("a")}),
		"running": newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a", withProbes), container("b")}).sandbox().runs("a", "b"),
		"crashed": newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a")}).sandbox().runs("a").exits("a", 1),
		"done":    newStory(corev1.RestartPolicyNever, nil, []corev1.Container{container("a")}).sandbox().runs("a").exits("a", 0).sandboxEnds(),
	} {
		for i := range s.in.Containers {
			s.in.Containers[i].Started = s.in.Containers[i].Started.Add(123456789) // the runtime's precision
		}
		t.Run(name, func(t *testing.T) {
			s.look()
			want, _ := json.Marshal(s.look())
			for range 3 {
				if got, _ := json.Marshal(s.look()); string(got) != string(want) {
					t.Errorf("got  %s\nthen %s", want, got)
				}
			}
			before, _ := json.Marshal(s.in.Pod)
			s.next()
			if after, _ := json.Marshal(s.in.Pod); string(after) != string(before) {
				t.Error("the pod was changed")
			}
		})
	}
}

func TestCrashLoop(t *testing.T) {
	s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a")}).sandbox().runs("a")
	s.look()
	got := s.exits("a", 1).look()
	checkSummary(t, got, "Running", "a: Error(1)")
	checkConditions(t, got, map[corev1.PodConditionType]string{ready: "False ContainersNotReady: containers with unready status: [a]"})
	s.in.Waiting["a"] = Waiting{"CrashLoopBackOff", "back-off 10s restarting failed container=a pod=web_default(uid-1)"}
	checkSummary(t, s.look(), "Running", "a: waiting(CrashLoopBackOff) after Error(1)")
	checkSummary(t, s.look(), "Running", "a: waiting(CrashLoopBackOff) after Error(1)")
	delete(s.in.Waiting, "a")
	checkSummary(t, s.runs("a").look(), "Running", "a: running after Error(1) started ready restarts=1")
	s.exits("a", 2).vanishes("a") // with its history
	s.in.Waiting["a"] = Waiting{"CrashLoopBackOff", ""}
	checkSummary(t, s.look(), "Running", "a: waiting(CrashLoopBackOff) after Error(1) restarts=1")
	checkSummary(t, s.runs("a").look(), "Running", "a: running after Error(1) started ready restarts=1")
}

func TestJobEnds(t *testing.T) {
	for _, tc := range []struct {
		policy  corev1.RestartPolicy
		codes   [2]int32
		phase   corev1.PodPhase
		ready   string
		restart bool
	}{
		{corev1.RestartPolicyNever, [2]int32{0, 0}, corev1.PodSucceeded, "False PodCompleted", false},
		{corev1.RestartPolicyNever, [2]int32{0, 3}, corev1.PodFailed, "False PodFailed", false},
		{corev1.RestartPolicyOnFailure, [2]int32{0, 0}, corev1.PodSucceeded, "False PodCompleted", false},
		{corev1.RestartPolicyOnFailure, [2]int32{0, 3}, corev1.PodRunning, "False ContainersNotReady: containers with unready status: [a b]", true},
		{corev1.RestartPolicyAlways, [2]int32{0, 0}, corev1.PodRunning, "False ContainersNotReady: containers with unready status: [a b]", true},
	} {
		t.Run(string(tc.policy)+" "+string(tc.phase), func(t *testing.T) {
			s := newStory(tc.policy, nil, []corev1.Container{container("a"), container("b")}).sandbox().runs("a", "b")
			s.look()
			got := s.exits("a", tc.codes[0]).exits("b", tc.codes[1]).look()
			if got.Phase != corev1.PodRunning || s.terminal == tc.restart {
				t.Errorf("while the sandbox is there: %s, terminal %v", got.Phase, s.terminal)
			}
			if tc.restart {
				return
			}
			s.sandboxEnds()
			s.in.Stopped = true
			got = s.look()
			if got.Phase != tc.phase || !s.terminal || conditionOf(got, ready) != tc.ready || conditionOf(got, allReady) != tc.ready {
				t.Errorf("in the end: %s, %s", got.Phase, conditionOf(got, ready))
			}
			if got.PodIP != "10.0.0.9" {
				t.Errorf("the address is gone: %q", got.PodIP)
			}
		})
	}
}

func TestTerminalPhaseIsNeverLeft(t *testing.T) {
	s := newStory(corev1.RestartPolicyNever, nil, []corev1.Container{container("a")}).sandbox().runs("a").exits("a", 0).sandboxEnds()
	s.look()
	s.in.Failed = &Failure{Reason: Evicted, Message: "late"}
	s.vanishes("a")
	got := s.look()
	if got.Phase != corev1.PodSucceeded || got.Reason != "" {
		t.Errorf("%s %s", got.Phase, got.Reason)
	}
	checkSummary(t, got, "Succeeded", "a: Completed(0)")
}

func TestDeletion(t *testing.T) {
	s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a"), container("b")}).sandbox().runs("a", "b")
	s.look()
	checkSummary(t, s.deleted().exits("a", 143).look(), "Running", "a: Error(143)", "b: running started ready")
	s.exits("b", 0).sandboxEnds()
	s.in.Stopped = true
	checkSummary(t, s.look(), "Failed", "a: Error(143)", "b: Completed(0)")
}

func TestContainersThatNobodySawEnd(t *testing.T) {
	t.Run("the pod goes on", func(t *testing.T) {
		s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a")}).sandbox().runs("a")
		s.look()
		s.vanishes("a")
		got := s.look()
		checkSummary(t, got, "Running", "a: waiting(ContainerCreating) after ContainerStatusUnknown(137) restarts=1")
		if m := got.ContainerStatuses[0].LastTerminationState.Terminated.Message; m != "The container could not be located when the pod was deleted.  The container used to be Running" {
			t.Errorf("message %q", m)
		}
		checkSummary(t, s.look(), "Running", "a: waiting(ContainerCreating) after ContainerStatusUnknown(137) restarts=1")
		checkSummary(t, s.sandbox().runs("a").look(), "Running", "a: running after ContainerStatusUnknown(137) started ready restarts=1")
	})
	t.Run("the pod ends", func(t *testing.T) {
		s := newStory(corev1.RestartPolicyNever, []corev1.Container{container("init")}, []corev1.Container{container("a")}).sandbox().runs("init").exits("init", 0).runs("a")
		s.look()
		s.vanishes("a").vanishes("init").sandboxEnds()
		s.in.Stopped = true
		got := s.look()
		checkSummary(t, got, "Failed", "init: Completed(0) ready", "a: ContainerStatusUnknown(137) after ContainerStatusUnknown(137) restarts=1")
		if m := got.ContainerStatuses[0].State.Terminated.Message; m != "The container could not be located when the pod was terminated" {
			t.Errorf("message %q", m)
		}
	})
	t.Run("it never began", func(t *testing.T) {
		s := newStory(corev1.RestartPolicyAlways, []corev1.Container{container("one"), container("two")}, []corev1.Container{container("a")})
		s.look()
		s.deleted()
		s.in.Stopped = true
		checkSummary(t, s.look(), "Failed", "one: ContainerStatusUnknown(137)", "two: waiting(PodInitializing)", "a: waiting(PodInitializing)")
	})
	t.Run("its state is unknown", func(t *testing.T) {
		s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a")}).sandbox().runs("a")
		s.look()
		s.in.Containers[0].State = unknown
		for range 2 {
			checkSummary(t, s.look(), "Running", "a: ContainerStatusUnknown(137) restarts=1")
		}
	})
	t.Run("an init container was removed", func(t *testing.T) {
		s := newStory(corev1.RestartPolicyAlways, []corev1.Container{container("init")}, []corev1.Container{container("a")}).sandbox().runs("a")
		checkSummary(t, s.look(), "Running", "init: Completed(0) ready", "a: running started ready") // nothing was reported before
	})
}

func TestEndedByTheNode(t *testing.T) {
	start := func() *story {
		s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a")}).sandbox().runs("a")
		s.look()
		return s
	}
	end := func(s *story) corev1.PodStatus {
		held := s.look()
		if held.Phase != corev1.PodRunning || held.Reason != "" || !s.terminal || conditionOf(held, disruption) != "none" {
			t.Errorf("while it runs: %s %q, terminal %v, %s", held.Phase, held.Reason, s.terminal, conditionOf(held, disruption))
		}
		s.exits("a", 137).sandboxEnds()
		s.in.Stopped = true
		return s.look()
	}
	t.Run("evicted", func(t *testing.T) {
		s := start()
		s.in.Failed = &Failure{Reason: Evicted, Message: "The node was low on resource: memory.", Disruption: true}
		got := end(s)
		if got.Phase != corev1.PodFailed || got.Reason != "Evicted" || got.Message != "The node was low on resource: memory." {
			t.Errorf("%s %s %s", got.Phase, got.Reason, got.Message)
		}
		checkConditions(t, got, map[corev1.PodConditionType]string{disruption: "True TerminationByKubelet: The node was low on resource: memory.", ready: "False PodFailed"})
		s.in.Failed = nil // the agent was restarted
		again := s.look()
		if again.Reason != "Evicted" || conditionOf(again, disruption) == "none" {
			t.Errorf("forgotten: %s, %s", again.Reason, conditionOf(again, disruption))
		}
	})
	t.Run("deadline", func(t *testing.T) {
		s := start()
		s.in.Pod.Spec.ActiveDeadlineSeconds = new(int64(25)) // it was reported at 10 s
		if got := s.look(); s.terminal || got.Phase != corev1.PodRunning {
			t.Fatalf("too early: %s", got.Phase)
		}
		if d := Deadline(s.in.Pod, &s.in.Previous); !d.Equal(t0.Add(35 * time.Second)) {
			t.Errorf("deadline %v", d)
		}
		if s.look(); s.terminal {
			t.Fatal("too early at 30 s")
		}
		got := end(s)
		if got.Phase != corev1.PodFailed || got.Reason != "DeadlineExceeded" || got.Message != "Pod was active on the node longer than the specified deadline" || conditionOf(got, disruption) != "none" {
			t.Errorf("%s %s %s", got.Phase, got.Reason, got.Message)
		}
	})
	t.Run("rejected", func(t *testing.T) {
		s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a")})
		s.in.Failed = &Failure{Reason: "OutOfcpu", Message: "Pod was rejected: Node didn't have enough resource: cpu", Rejected: true}
		for range 2 {
			got := s.look()
			if got.Phase != corev1.PodFailed || got.Reason != "OutOfcpu" || len(got.ContainerStatuses)+len(got.Conditions) != 0 || !s.terminal {
				t.Errorf("%+v", got)
			}
			s.in.Failed = nil
		}
	})
}

func TestProbesInStatus(t *testing.T) {
	s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a", withProbes)}).sandbox().runs("a")
	checkSummary(t, s.look(), "Running", "a: running") // nothing is known yet
	s.probes.started["a-0"], s.probes.ready["a-0"] = true, false
	checkSummary(t, s.look(), "Running", "a: running started")
	s.probes.ready["a-0"] = true
	checkSummary(t, s.look(), "Running", "a: running started ready")
	clear(s.probes.started) // the agent was restarted
	clear(s.probes.ready)
	checkSummary(t, s.look(), "Running", "a: running started ready")
	checkSummary(t, s.exits("a", 1).look(), "Running", "a: Error(1)")
	checkSummary(t, s.runs("a").look(), "Running", "a: running after Error(1) restarts=1") // another container: nothing is known of it
}

func TestReadinessGates(t *testing.T) {
	s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a")}).sandbox().runs("a")
	s.in.Pod.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "x.test/lb"}, {ConditionType: "x.test/dns"}, {ConditionType: corev1.PodInitialized}}
	s.in.Gates = map[corev1.PodConditionType]corev1.ConditionStatus{"x.test/dns": "False"}
	got := s.look()
	checkConditions(t, got, map[corev1.PodConditionType]string{allReady: "True", "x.test/dns": "none",
		ready: `False ReadinessGatesNotReady: corresponding condition of pod readiness gate "x.test/lb" does not exist., the status of pod readiness gate "x.test/dns" is not "True", but False`})
	s.in.Gates = map[corev1.PodConditionType]corev1.ConditionStatus{"x.test/dns": "True", "x.test/lb": "True"}
	checkConditions(t, s.look(), map[corev1.PodConditionType]string{ready: "True"})
}

func TestSandboxConditions(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*story)
		want   string
	}{
		{"ready", func(*story) {}, "True"},
		{"ended", func(s *story) { s.sandboxEnds() }, "False PodSandboxNotReady: pod sandbox is not ready"},
		{"two", func(s *story) { s.in.Sandboxes = append(s.in.Sandboxes, s.in.Sandboxes[0]) }, "False PodSandboxNotReady: multiple pod sandboxes are ready and need to be reconciled"},
		{"no address", func(s *story) { s.in.Sandboxes[0].Network.Ip = "" }, "False PodSandboxNotReady: pod sandbox has no IP address"},
		{"host network", func(s *story) { s.in.Pod.Spec.HostNetwork = true }, "False PodSandboxNotReady: network namespace mode changed and sandbox needs to be recreated"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a")}).sandbox()
			tc.change(s)
			checkConditions(t, s.look(), map[corev1.PodConditionType]string{startable: tc.want})
		})
	}
}

func TestAddresses(t *testing.T) {
	for _, tc := range []struct {
		name     string
		host     []string
		sandbox  []string // the first is the primary
		hostNet  bool
		previous []string
		want     string
	}{
		{"one", []string{"192.0.2.1"}, []string{"10.0.0.9"}, false, nil, "10.0.0.9"},
		{"the node's family first", []string{"192.0.2.1", "2001:db8::1"}, []string{"fd00::9", "10.0.0.9", "10.0.0.10"}, false, nil, "10.0.0.9 fd00::9"},
		{"six first", []string{"2001:db8::1"}, []string{"10.0.0.9", "fd00::9"}, false, nil, "fd00::9 10.0.0.9"},
		{"written in another way", []string{"2001:db8::1"}, []string{"FD00:0:0::9"}, false, nil, "fd00::9"},
		{"host network", []string{"192.0.2.1", "2001:db8::1"}, nil, true, nil, "192.0.2.1 2001:db8::1"},
		{"host network, the node moved", []string{"192.0.2.7"}, nil, true, []string{"192.0.2.1"}, "192.0.2.1"},
		{"host network, a second family came", []string{"192.0.2.7", "2001:db8::1"}, nil, true, []string{"192.0.2.1"}, "192.0.2.1 2001:db8::1"},
		{"the sandbox is gone", []string{"192.0.2.1"}, nil, false, []string{"10.0.0.9"}, "10.0.0.9"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a")})
			s.in.HostIPs, s.in.Pod.Spec.HostNetwork = tc.host, tc.hostNet
			if len(tc.sandbox) > 0 {
				n := s.sandbox().in.Sandboxes[0].Network
				n.Ip = tc.sandbox[0]
				for _, ip := range tc.sandbox[1:] {
					n.AdditionalIps = append(n.AdditionalIps, &runtimeapi.PodIP{Ip: ip})
				}
			}
			for _, ip := range tc.previous {
				s.in.Previous.PodIPs = append(s.in.Previous.PodIPs, corev1.PodIP{IP: ip})
			}
			got := s.look()
			if ips := strings.Join(PodIPs(&got), " "); ips != tc.want || got.PodIP != strings.Fields(tc.want)[0] || got.HostIPs[0].IP != tc.host[0] {
				t.Errorf("pod %s (%s), host %v; want %s", ips, got.PodIP, got.HostIPs, tc.want)
			}
		})
	}
}

func list(cpu, memory string) corev1.ResourceList {
	l := corev1.ResourceList{}
	if cpu != "" {
		l[corev1.ResourceCPU] = resource.MustParse(cpu)
	}
	if memory != "" {
		l[corev1.ResourceMemory] = resource.MustParse(memory)
	}
	return l
}

func TestResources(t *testing.T) {
	big := func(c *corev1.Container) {
		c.Resources = corev1.ResourceRequirements{Requests: list("100m", "20Mi"), Limits: list("500m", "64Mi")}
	}
	s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a", big), container("b")})
	check := func(what string, got any, want string) {
		t.Helper()
		if b, _ := json.Marshal(got); string(b) != want {
			t.Errorf("%s: %s\nwant %s", what, b, want)
		}
	}
	got := s.look()
	check("pod, pending", got.Resources, `{"limits":{"cpu":"500m","memory":"64Mi"},"requests":{"cpu":"100m","memory":"20Mi"}}`)
	s.sandbox().runs("a", "b")
	s.in.Containers[1].Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 30000, CpuShares: 51, MemoryLimitInBytes: 32 << 20}
	got = s.look()
	check("pod, running", got.Resources, `{"requests":{"cpu":"100m","memory":"20Mi"}}`) // b has no limit: nor has the pod's cgroup
	check("allocated", got.AllocatedResources, `{"cpu":"100m","memory":"20Mi"}`)
	check("a", got.ContainerStatuses[0].Resources, `{"limits":{"cpu":"300m","memory":"32Mi"},"requests":{"cpu":"50m","memory":"20Mi"}}`)
	check("a, allocated", got.ContainerStatuses[0].AllocatedResources, `{"cpu":"100m","memory":"20Mi"}`)
	check("b", got.ContainerStatuses[1].Resources, `{}`)
	s.in.Containers[1].Resources = nil // a runtime that says nothing
	check("a, unknown", s.look().ContainerStatuses[0].Resources, `{"limits":{"cpu":"500m","memory":"64Mi"},"requests":{"cpu":"100m","memory":"20Mi"}}`)
}

func TestMountsAndUser(t *testing.T) {
	mode := func(m corev1.RecursiveReadOnlyMode) *corev1.RecursiveReadOnlyMode { return &m }
	c := container("a", func(c *corev1.Container) {
		c.VolumeMounts = []corev1.VolumeMount{
			{Name: "rw", MountPath: "/rw"}, {Name: "ro", MountPath: "/ro", ReadOnly: true},
			{Name: "rro", MountPath: "/rro", ReadOnly: true, RecursiveReadOnly: mode(corev1.RecursiveReadOnlyIfPossible)},
			{Name: "off", MountPath: "/off", ReadOnly: true, RecursiveReadOnly: mode(corev1.RecursiveReadOnlyDisabled)},
		}
	})
	for able, want := range map[bool]string{
		true:  `[{"name":"rw","mountPath":"/rw"},{"name":"ro","mountPath":"/ro","readOnly":true,"recursiveReadOnly":"Disabled"},{"name":"rro","mountPath":"/rro","readOnly":true,"recursiveReadOnly":"Enabled"},{"name":"off","mountPath":"/off","readOnly":true,"recursiveReadOnly":"Disabled"}]`,
		false: `[{"name":"rw","mountPath":"/rw"},{"name":"ro","mountPath":"/ro","readOnly":true,"recursiveReadOnly":"Disabled"},{"name":"rro","mountPath":"/rro","readOnly":true,"recursiveReadOnly":"Disabled"},{"name":"off","mountPath":"/off","readOnly":true,"recursiveReadOnly":"Disabled"}]`,
	} {
		s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{c}).sandbox().runs("a")
		s.in.RecursiveReadOnly = able
		s.in.Containers[0].User = &runtimeapi.LinuxContainerUser{Uid: 5, Gid: 6, SupplementalGroups: []int64{6, 7}}
		got := s.look().ContainerStatuses[0]
		if b, _ := json.Marshal(got.VolumeMounts); string(b) != want {
			t.Errorf("mounts %s\nwant %s", b, want)
		}
		if b, _ := json.Marshal(got.User); string(b) != `{"linux":{"uid":5,"gid":6,"supplementalGroups":[6,7]}}` {
			t.Errorf("user %s", b)
		}
	}
}

func TestMessagesAreBounded(t *testing.T) {
	s := newStory(corev1.RestartPolicyNever, nil, []corev1.Container{container("a"), container("b"), container("c")}).sandbox().runs("a", "b", "c").exits("b", 1)
	s.in.latest("b").Message = strings.Repeat("x", 5000)
	if n := len(s.look().ContainerStatuses[1].State.Terminated.Message); n != 4096 {
		t.Errorf("%d bytes", n)
	}
}

func TestEphemeral(t *testing.T) {
	s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a")}).sandbox().runs("a")
	s.in.Pod.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon(container("debug"))}}
	s.in.Waiting["debug"] = Waiting{"ErrImagePull", "no such image"}
	checkSummary(t, s.look(), "Running", "a: running started ready", "debug: waiting(ErrImagePull)")
	delete(s.in.Waiting, "debug")
	checkSummary(t, s.runs("debug").look(), "Running", "a: running started ready", "debug: running")
	checkSummary(t, s.exits("debug", 1).look(), "Running", "a: running started ready", "debug: Error(1)")
}

func TestStaticPodHasNoEnd(t *testing.T) {
	s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a")}).sandbox().runs("a")
	s.in.Pod.Annotations = map[string]string{"kubernetes.io/config.source": "file"}
	s.look()
	s.exits("a", 1).sandboxEnds()
	s.in.Stopped = true
	if got := s.look(); got.Phase != corev1.PodRunning {
		t.Errorf("phase %s", got.Phase)
	}
}

func TestNobodyProbes(t *testing.T) {
	s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a", withProbes)}).sandbox().runs("a")
	s.in.Probes, s.in.Hash = nil, nil
	checkSummary(t, s.look(), "Running", "a: running")
	if got := done(s.next()); got != "" {
		t.Errorf("to do: %s", got)
	}
}
