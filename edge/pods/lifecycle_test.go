package pods_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// manifest is a pod of one busybox container that runs a script; more is added to
// the spec, indented by two.
func manifest(name, script, container, spec string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Pod\nmetadata: {name: %s, labels: {app: demo}}\nspec:\n  terminationGracePeriodSeconds: 1\n", name)
	for _, l := range strings.Split(strings.TrimSpace(spec), "\n") {
		fmt.Fprintf(&b, "  %s\n", l)
	}
	fmt.Fprintf(&b, "  containers:\n  - name: main\n    image: fairlead.test/busybox:1\n    command: [sh, -c, %q]\n", script)
	for _, l := range strings.Split(strings.TrimSpace(container), "\n") {
		fmt.Fprintf(&b, "    %s\n", l)
	}
	return b.String()
}

const forever = "trap 'exit 0' TERM; while :; do sleep 0.1; done"

// log reads what a container wrote.
func (s *site) log(p *corev1.Pod, container string, attempt int) string {
	s.t.Helper()
	path := filepath.Join(s.dir, "logs", fmt.Sprintf("%s_%s_%s", p.Namespace, p.Name, p.UID), container, fmt.Sprintf("%d.log", attempt))
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	var out []string
	for _, l := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		if parts := strings.SplitN(l, " ", 4); len(parts) == 4 {
			out = append(out, parts[3])
		}
	}
	return strings.Join(out, "\n")
}

// remove deletes a pod as the cloud does, to the end.
func (s *site) remove(p *corev1.Pod) {
	s.t.Helper()
	now := metav1.Now()
	q := p.DeepCopy()
	q.DeletionTimestamp, q.DeletionGracePeriodSeconds = &now, p.Spec.TerminationGracePeriodSeconds
	s.apply(q)
	s.eventually(p.Name+" gone", func() bool { r, _, ok := s.report(p); return ok && r.Gone })
	s.withdraw(p)
	s.eventually(p.Name+" retracted", func() bool { _, _, ok := s.report(p); return !ok })
}

func (s *site) configMap(name string, data map[string]string) {
	s.t.Helper()
	s.rev++
	s.publish(topic.DesiredConfigMap(node, "default", name), payload.Encode(payload.ConfigMap{
		UID: "cm-" + name, Rev: s.rev, Namespace: "default", Name: name, Data: data,
	}))
}

func TestLifecycle(t *testing.T) {
	s := newSite(t)
	for _, c := range []struct {
		name, script, container, spec string
		want                          func(t *testing.T, p *corev1.Pod)
	}{
		{"job", "echo done", "", "restartPolicy: Never", func(t *testing.T, p *corev1.Pod) {
			st := s.until(p, "succeeded", func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodSucceeded })
			if x := st.ContainerStatuses[0].State.Terminated; x == nil || x.Reason != "Completed" {
				t.Errorf("container %+v", st.ContainerStatuses[0])
			}
			if got := s.log(p, "main", 0); got != "done" {
				t.Errorf("log %q", got)
			}
		}},
		{"failing", "echo last words > /dev/termination-log; exit 3", "", "restartPolicy: Never", func(t *testing.T, p *corev1.Pod) {
			st := s.until(p, "failed", func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodFailed })
			if x := st.ContainerStatuses[0].State.Terminated; x == nil || x.ExitCode != 3 || x.Message != "last words\n" {
				t.Errorf("container %+v", x)
			}
		}},
		{"crashing", "exit 1", "", "restartPolicy: Always", func(t *testing.T, p *corev1.Pod) {
			st := s.until(p, "in its crash loop", func(st *corev1.PodStatus) bool {
				return len(st.ContainerStatuses) == 1 && st.ContainerStatuses[0].State.Waiting != nil &&
					st.ContainerStatuses[0].State.Waiting.Reason == "CrashLoopBackOff"
			})
			if st.ContainerStatuses[0].RestartCount != 1 || !s.heard("BackOff", "Back-off restarting failed container main") {
				t.Errorf("restarts %d", st.ContainerStatuses[0].RestartCount)
			}
		}},
		{"inits", "test -f /w/a -a -f /w/b && " + forever, `
volumeMounts: [{name: w, mountPath: /w}]`, `
volumes: [{name: w, emptyDir: {}}]
initContainers:
- {name: a, image: "fairlead.test/busybox:1", command: [touch, /w/a], volumeMounts: [{name: w, mountPath: /w}]}
- {name: b, image: "fairlead.test/busybox:1", command: [sh, -c, "test -f /w/a && touch /w/b"], volumeMounts: [{name: w, mountPath: /w}]}`,
			func(t *testing.T, p *corev1.Pod) { s.until(p, "running", running) }},
		{"sidecar", "sleep 0.3", "", `
restartPolicy: Never
initContainers:
- {name: side, image: "fairlead.test/busybox:1", restartPolicy: Always, command: [sh, -c, "trap 'exit 0' TERM; while :; do sleep 0.1; done"]}`,
			func(t *testing.T, p *corev1.Pod) {
				s.until(p, "succeeded though the sidecar runs", func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodSucceeded })
			}},
		{"deadline", forever, "", "activeDeadlineSeconds: 1", func(t *testing.T, p *corev1.Pod) {
			st := s.until(p, "ended", func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodFailed })
			if st.Reason != "DeadlineExceeded" {
				t.Errorf("reason %q", st.Reason)
			}
		}},
		{"unhealthy", forever, `
livenessProbe: {exec: {command: ["false"]}, periodSeconds: 1, failureThreshold: 1}`, "", func(t *testing.T, p *corev1.Pod) {
			s.until(p, "restarted", func(st *corev1.PodStatus) bool {
				return len(st.ContainerStatuses) == 1 && st.ContainerStatuses[0].RestartCount > 0
			})
			if !s.heard("Killing", "failed liveness probe, will be restarted") || !s.heard("Unhealthy", "Liveness probe failed") {
				t.Errorf("events:\n%s", s.said())
			}
		}},
		{"hooks", forever, `
volumeMounts: [{name: w, mountPath: /w}]
lifecycle: {postStart: {exec: {command: [touch, /w/started]}}, preStop: {exec: {command: [touch, /w/stopped]}}}`,
			"volumes: [{name: w, hostPath: {path: HOSTDIR}}]", func(t *testing.T, p *corev1.Pod) {
				s.until(p, "running", running)
				dir := p.Spec.Volumes[0].HostPath.Path
				if _, err := os.Stat(filepath.Join(dir, "started")); err != nil {
					t.Error(err)
				}
				s.remove(p)
				if _, err := os.Stat(filepath.Join(dir, "stopped")); err != nil {
					t.Error(err)
				}
			}},
		{"env", `echo "$POD $APP $CM $(cat /c/key)"; ` + forever, `
env:
- {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: APP, valueFrom: {fieldRef: {fieldPath: "metadata.labels['app']"}}}
- {name: CM, valueFrom: {configMapKeyRef: {name: late, key: key}}}
volumeMounts: [{name: c, mountPath: /c}]`, "volumes: [{name: c, configMap: {name: late}}]", func(t *testing.T, p *corev1.Pod) {
			s.eventually("told that it waits", func() bool {
				return s.heard("FailedMount", `MountVolume.SetUp failed for volume "c" : configmap "late" not found`)
			})
			s.configMap("late", map[string]string{"key": "value"})
			s.until(p, "running", running)
			s.eventually("log", func() bool { return s.log(p, "main", 0) == "env demo value value" })
		}},
		{"noimage", forever, "imagePullPolicy: Never", "", func(t *testing.T, p *corev1.Pod) {
			s.until(p, "waiting for its image", func(st *corev1.PodStatus) bool {
				return len(st.ContainerStatuses) == 1 && st.ContainerStatuses[0].State.Waiting != nil &&
					st.ContainerStatuses[0].State.Waiting.Reason == "ErrImageNeverPull"
			})
		}},
		{"toobig", forever, "resources: {requests: {cpu: 100}}", "", func(t *testing.T, p *corev1.Pod) {
			st := s.until(p, "refused", func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodFailed })
			if st.Reason != "OutOfcpu" {
				t.Errorf("reason %q: %s", st.Reason, st.Message)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := manifest(c.name, c.script, c.container, strings.ReplaceAll(c.spec, "HOSTDIR", t.TempDir()))
			if c.name == "noimage" {
				m = strings.ReplaceAll(m, "busybox:1", "nowhere:1")
			}
			p := pod(t, m)
			s.apply(p)
			c.want(t, p)
			if _, _, ok := s.report(p); ok {
				s.remove(p)
			}
		})
	}
}
