package node

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/schemas/payload"
)

// ErrRuntimeDown is why a node is not ready whose runtime does not answer.
var ErrRuntimeDown = errors.New("container runtime is down")

// ErrShutdown is why a node is not ready that is going down.
var ErrShutdown = errors.New("node is shutting down")

// RuntimeProblems are the reasons, in the kubelet's words, why the runtime cannot
// run pods: status and err are what CRI Status gave.
func RuntimeProblems(status *runtimeapi.RuntimeStatus, err error) []error {
	if err != nil || status == nil {
		return []error{ErrRuntimeDown}
	}
	var errs []error
	for _, w := range []struct{ kind, text string }{
		{runtimeapi.RuntimeReady, "container runtime not ready"},
		{runtimeapi.NetworkReady, "container runtime network not ready"},
	} {
		i := slices.IndexFunc(status.Conditions, func(c *runtimeapi.RuntimeCondition) bool { return c.Type == w.kind })
		if i < 0 {
			errs = append(errs, fmt.Errorf("%s: it does not tell %s", w.text, w.kind))
			continue
		}
		if c := status.Conditions[i]; !c.Status {
			errs = append(errs, fmt.Errorf("%s: %s=%t reason:%s message:%s", w.text, c.Type, c.Status, c.Reason, c.Message))
		}
	}
	return errs
}

// Ready is the condition of that name: False if there are problems.
func Ready(problems ...error) corev1.NodeCondition {
	c := corev1.NodeCondition{
		Type: corev1.NodeReady, Status: corev1.ConditionTrue,
		Reason: "KubeletReady", Message: "kubelet is posting ready status", LastTransitionTime: metav1.Now(),
	}
	if err := utilerrors.NewAggregate(problems); err != nil {
		c.Status, c.Reason, c.Message = corev1.ConditionFalse, "KubeletNotReady", err.Error()
	}
	return c
}

// Conditions writes conditions for the wire. Those that have the status of before
// keep the time since when they have it, over restarts of the agent too.
func Conditions(before []payload.NodeCondition, now []corev1.NodeCondition) []payload.NodeCondition {
	out := make([]payload.NodeCondition, 0, len(now))
	for _, c := range now {
		p := payload.NodeCondition{
			Type: string(c.Type), Status: string(c.Status), Reason: c.Reason, Message: c.Message,
			Since: cmp.Or(c.LastTransitionTime.Time, time.Now()).UnixMilli(),
		}
		for _, b := range before {
			if b.Type == p.Type && b.Status == p.Status {
				p.Since = b.Since
			}
		}
		out = append(out, p)
	}
	return out
}

// Quantities writes resources for the wire.
func Quantities(l corev1.ResourceList) map[string]string {
	out := make(map[string]string, len(l))
	for name, q := range l {
		out[string(name)] = q.String()
	}
	return out
}

// How much of the images is told, as the kubelet's.
const (
	maxImages = 50
	maxNames  = 5
)

// Images are the largest images with their names, digests first.
func Images(list []*runtimeapi.Image) []payload.NodeImage {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b *runtimeapi.Image) int {
		return cmp.Or(cmp.Compare(b.GetSize(), a.GetSize()), cmp.Compare(b.GetId(), a.GetId()))
	})
	list = list[:min(len(list), maxImages)]
	out := make([]payload.NodeImage, 0, len(list))
	for _, i := range list {
		names := slices.Concat(i.GetRepoDigests(), i.GetRepoTags())
		out = append(out, payload.NodeImage{Names: names[:min(len(names), maxNames)], Size: int64(i.GetSize())})
	}
	return out
}
