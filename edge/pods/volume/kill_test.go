package volume

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/utils/ptr"
)

// The test program runs itself with these in the environment, as an agent that is
// killed after so many steps.
const (
	killDir = "FAIRLEAD_VOLUME_KILL_DIR"
	killAt  = "FAIRLEAD_VOLUME_KILL_AT"
)

func killed(dir string) {
	left, _ := strconv.Atoi(os.Getenv(killAt))
	reached = func(step string) {
		if left--; left == 0 {
			fmt.Println(step)
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	o := &objects{}
	cfg := testConfig(dir, o)
	cfg.Log = slog.New(slog.DiscardHandler)
	v, err := New(cfg)
	if err == nil {
		err = life(v, o, killPod())
	}
	if err == nil {
		err = v.TearDown(context.Background(), uid)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func killPod() *corev1.Pod {
	pod := fullPod()
	pod.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: ptr.To[int64](3000)}
	pod.Spec.Volumes = append(pod.Spec.Volumes, vol("token", corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
		{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}}}}}))
	pod.Spec.Containers[0].VolumeMounts = append(pod.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: "token", MountPath: "/token"})
	return pod
}

// life is what happens to a pod's volumes: it starts, what it refers to changes, it restarts.
func life(v *Volumes, o *objects, pod *corev1.Pod) error {
	o.maps = map[string]map[string]string{"conf": {"a.conf": "1", "old.conf": "1"}}
	o.secrets = map[string]map[string]string{"tls": {"key": "1", "old": "1"}}
	o.tokens = map[string]token{"": {"1", time.Now().Add(time.Hour)}}
	c := &pod.Spec.Containers[0]
	for _, ip := range []string{"10.88.0.7", "10.88.0.8"} {
		if err := v.SetUp(context.Background(), pod); err != nil {
			return err
		}
		hosts, err := v.Hosts(pod, []string{ip}, "press", "")
		if err != nil {
			return err
		}
		if _, err := v.Mounts(MountInput{Pod: pod, Container: c, Hosts: hosts}); err != nil {
			return err
		}
		o.maps["conf"] = map[string]string{"a.conf": "2", "new.conf": "2"}
		o.secrets["tls"] = map[string]string{"key": "2", "new": "2"}
		o.tokens[""] = token{"2", time.Now().Add(time.Hour)}
		if _, err := v.Update(pod); err != nil {
			return err
		}
	}
	return nil
}

// lived is what is there after that, but for the termination messages.
const lived = `2777 0:3000 ./
2755 0:3000 ..stamp/
0644 0:3000 ..stamp/a.conf "2"
0644 0:3000 ..stamp/new.conf "2"
0777 0:3000 ..data -> ..stamp
0777 0:3000 a.conf -> ..data/a.conf
2755 0:3000 below/
0777 0:3000 new.conf -> ..data/new.conf
3777 0:3000 ./
2755 0:3000 ..stamp/
0644 0:3000 ..stamp/key "2"
0644 0:3000 ..stamp/new "2"
0777 0:3000 ..data -> ..stamp
0777 0:3000 key -> ..data/key
0777 0:3000 new -> ..data/new
2777 0:3000 ./
2777 0:3000 logs/
2777 0:3000 logs/main/
3777 0:3000 ./
3777 0:3000 x/
3777 0:3000 ./
2755 0:3000 ..stamp/
0640 0:3000 ..stamp/token "2"
0777 0:3000 ..data -> ..stamp
0777 0:3000 token -> ..data/token
`

// The agent is killed after each single step of a pod's life. Then either the next
// one takes the pod's life up, or the pod is gone: nothing is half, nothing is left.
func TestKill(t *testing.T) {
	rootOnly(t)
	var at []string
	died := true
	for n := 1; died; n++ {
		if len(at) > 0 && at[len(at)-1] == "removed" {
			n += 4 // one file or another
		}
		for _, lives := range []bool{true, false} {
			dir := t.TempDir()
			v := newVolumes(t, dir, &objects{})
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), killDir+"="+dir, killAt+"="+strconv.Itoa(n))
			out, err := cmd.CombinedOutput()
			step := strings.TrimSpace(string(out))
			if died = err != nil; died && cmd.ProcessState.ExitCode() >= 0 {
				t.Fatal(err, step)
			}
			if lives {
				at = append(at, step)
				pod := killPod()
				if err := life(v, v.cfg.Objects.(*objects), pod); err != nil {
					t.Errorf("killed after step %d, %s: %v", n, step, err)
				}
				var got strings.Builder
				for i := range pod.Spec.Volumes {
					got.WriteString(tree(t, v.path(pod, &pod.Spec.Volumes[i])))
				}
				if diff := cmp.Diff(lived, got.String()); diff != "" {
					t.Errorf("killed after step %d, %s: %s", n, step, diff)
				}
				if at := mountsBelow(t, v.cfg.Dir); len(at) != 6 { // three tmpfs, three sub paths
					t.Errorf("killed after step %d, %s: mounts %v", n, step, at)
				}
				root := v.cfg.Dir + "/" + string(uid)
				if got := read(t, root+"/subpaths/conf/main/0"); got != "2" {
					t.Errorf("killed after step %d, %s: the sub path has %q", n, step, got)
				}
				if got := read(t, root+"/etc-hosts"); !strings.HasSuffix(got, "\n10.88.0.8\tpress\n") {
					t.Errorf("killed after step %d, %s: hosts %q", n, step, got)
				}
			}
			if err := v.TearDown(t.Context(), uid); err != nil {
				t.Errorf("killed after step %d, %s: %v", n, step, err)
			}
			nothingLeft(t, v)
			if t.Failed() {
				return
			}
		}
	}
	t.Logf("killed at %d places: %s", len(at)-1, strings.Join(at, ", "))
	for _, step := range []string{"mounted", "file", "link", "new ..data", "swapped", "swept", "bound", "unmounted", "removed", "volume", "message file", "hosts"} {
		if !strings.Contains(strings.Join(at, ",")+",", step+",") {
			t.Errorf("never killed at step %q", step)
		}
	}
}
