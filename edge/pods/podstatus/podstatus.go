// Package podstatus decides, from what a pod wants and what the runtime shows,
// what to say about the pod and what to do next. It is pure: no I/O, no clock, the
// same input gives the same bytes.
//
//	status, terminal := podstatus.Compute(in)
//	// report status; when terminal, stop what still runs, then Compute with Stopped
//	actions := podstatus.Next(in, status)
//
// Phases, conditions, reasons and messages are those of the stock kubelet 1.37
// with its default features.
package podstatus

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Reasons of a container that waits, and of one that nobody can find any more.
const (
	ContainerCreating       = "ContainerCreating"
	PodInitializing         = "PodInitializing"
	RestartingAllContainers = "RestartingAllContainers"
	ContainerStatusUnknown  = "ContainerStatusUnknown"
)

// Reasons and messages of a pod that failed as a whole.
const (
	DeadlineExceeded        = "DeadlineExceeded"
	DeadlineExceededMessage = "Pod was active on the node longer than the specified deadline"
	Evicted                 = "Evicted"
	NodeShutdown            = "NodeShutdown"
	NodeShutdownMessage     = "Pod was rejected as the node is shutting down."
	Terminated              = "Terminated"
	TerminatedMessage       = "Pod was terminated in response to imminent node shutdown."
)

// Input is all that the decisions rest on. Nothing in it is changed.
type Input struct {
	// Pod is the pod as desired: metadata (with generation, and with
	// deletionTimestamp once it is being deleted) and spec. Its status is not read.
	Pod *corev1.Pod
	// Previous is what was reported last of this UID; zero for a new pod.
	Previous corev1.PodStatus

	// Sandboxes are the pod's sandboxes, newest first.
	Sandboxes []*runtimeapi.PodSandboxStatus
	// Containers are all the pod's containers, dead ones too, newest first.
	Containers []Container
	// Runtime is the scheme of container ids, such as "containerd".
	Runtime string
	// RecursiveReadOnly: the runtime handler of the pod can mount recursively read-only.
	RecursiveReadOnly bool

	// HostIPs are the node's addresses: the primary, and for dual stack a second.
	HostIPs []string
	// QOS is the pod's class (spec.QOS).
	QOS corev1.PodQOSClass
	// Hash gives a container's hash as it was written into the annotation of its
	// runtime container (spec.Hash). Without it no change is seen.
	Hash func(*corev1.Container) string

	// Waiting says, by container name, why a container could not be started the
	// last time, such as CrashLoopBackOff or ErrImagePull.
	Waiting map[string]Waiting
	// Probes is what the probes say; nil where nothing is probed.
	Probes Probes
	// Gates are the conditions of readiness gates that others have set.
	Gates map[corev1.PodConditionType]corev1.ConditionStatus

	// Failed is set once the pod was rejected, evicted or ended by the node.
	Failed *Failure
	// Stopped: nothing of the pod runs any more, and nothing will be started again.
	Stopped bool

	Now time.Time
}

// Waiting is why a container waits.
type Waiting struct{ Reason, Message string }

// Failure is why the node ended a pod, such as Evicted.
type Failure struct {
	Reason, Message string
	// Disruption: the pod gets the condition DisruptionTarget (eviction under
	// pressure, preemption, node shutdown), so that a Job need not count it.
	Disruption bool
	// Rejected: the pod was not admitted, so that its status is this failure alone.
	Rejected bool
}

// Probes is what is known of running containers, by the runtime's plain id. known
// is false before the first result, and after a restart of the agent until there
// is a new one: then what was reported last of the same container holds.
type Probes interface {
	Started(containerID string) (started, known bool)
	Ready(containerID string) (ready, known bool)
	// Failed names the probe because of which the container is to be killed:
	// StartupProbe or LivenessProbe, else "".
	Failed(containerID string) KillReason
}

// KillReason says why a container is killed. It is a string so that the probes
// need not import this package.
type KillReason = string

// The reasons to kill a container.
const (
	StartupProbe        KillReason = "StartupProbe"
	LivenessProbe       KillReason = "LivenessProbe"
	FailedPostStartHook KillReason = "FailedPostStartHook"
	RestartAll          KillReason = "RestartAllContainers"
	Unspecified         KillReason = ""
)

// latest gives the newest container of that name, nil where there is none.
func (in *Input) latest(name string) *Container {
	for i := range in.Containers {
		if in.Containers[i].Name == name {
			return &in.Containers[i]
		}
	}
	return nil
}

// active gives the newest container of that name in the sandbox that is in use.
func (in *Input) active(name string) *Container {
	id := in.activeSandbox()
	if id == "" {
		return nil
	}
	for i := range in.Containers {
		if in.Containers[i].Name == name && in.Containers[i].SandboxID == id {
			return &in.Containers[i]
		}
	}
	return nil
}

// activeSandbox is the newest sandbox's id if that is ready, else "".
func (in *Input) activeSandbox() string {
	if len(in.Sandboxes) == 0 || in.Sandboxes[0].State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return ""
	}
	return in.Sandboxes[0].Id
}

// couldRun: something of the pod may still be running.
func (in *Input) couldRun() bool {
	if in.Stopped {
		return false
	}
	for i := range in.Containers {
		if in.Containers[i].State != runtimeapi.ContainerState_CONTAINER_EXITED {
			return true
		}
	}
	for _, s := range in.Sandboxes {
		if s.State == runtimeapi.PodSandboxState_SANDBOX_READY {
			return true
		}
	}
	return false
}

// static: the pod comes from the node's own folder, not from the API.
func static(pod *corev1.Pod) bool {
	source, ok := pod.Annotations["kubernetes.io/config.source"]
	return ok && source != "api"
}

func terminalPhase(p corev1.PodPhase) bool {
	return p == corev1.PodFailed || p == corev1.PodSucceeded
}
