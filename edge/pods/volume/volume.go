package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/edge/pods/source"
)

// The folders of a pod's volumes by kind, named as the stock kubelet's.
const (
	configMapKind   = "kubernetes.io~configmap"
	secretKind      = "kubernetes.io~secret" //nolint:gosec // a folder's name
	projectedKind   = "kubernetes.io~projected"
	downwardAPIKind = "kubernetes.io~downward-api"
	emptyDirKind    = "kubernetes.io~empty-dir"
)

// served are the types of volumes that there are on an edge node.
const served = "configMap, downwardAPI, emptyDir, hostPath, image, projected and secret"

// Config says where volumes are and what they are made of.
type Config struct {
	// Dir holds the folders of the pods, <Dir>/<uid>. It is made where it does not exist.
	Dir string
	// HostsFile is the node's own, for pods in the host's network. Empty is /etc/hosts.
	HostsFile string
	// Objects has what volumes are made of.
	Objects source.Objects
	// Allocatable is what pods may have: the default of resourceFieldRef, and the
	// most that a volume in memory may hold. Nil is nothing known.
	Allocatable func() corev1.ResourceList
	// ImageVolumes says whether the runtime mounts images. Nil is no.
	ImageVolumes func() bool
	// RecursiveReadOnly says whether the pod's runtime handler has recursive
	// read-only mounts. Nil is no.
	RecursiveReadOnly func(pod *corev1.Pod) bool
	// Log gets what is not said in errors. Nil is slog's default.
	Log *slog.Logger
}

// Volumes makes and clears the volumes of pods. It holds no state but the file
// system's. Calls for different pods may run at once; those for one pod may not,
// but for Usage.
type Volumes struct {
	cfg     Config
	selinux bool
}

// Waiting is why a volume of a pod is not there (yet). Its text is that of the
// event FailedMount.
type Waiting struct {
	// Volume is the volume's name in the pod.
	Volume string
	// Message is the stock kubelet's, such as
	// MountVolume.SetUp failed for volume "x" : configmap "y" not found
	Message string
	// Err is what the message ends with.
	Err error
}

func (w *Waiting) Error() string { return w.Message }
func (w *Waiting) Unwrap() error { return w.Err }

func waiting(volume string, err error) *Waiting {
	return &Waiting{volume, fmt.Sprintf("MountVolume.SetUp failed for volume %q : %v", volume, err), err}
}

// Missing lists the volumes that an error of SetUp or Update is about, an event
// FailedMount each. It is empty where the error is about the whole pod.
func Missing(err error) []*Waiting {
	switch e := err.(type) { //nolint:errorlint // it is the tree of errors that is walked
	case *Waiting:
		return []*Waiting{e}
	case interface{ Unwrap() error }:
		return Missing(e.Unwrap())
	case interface{ Unwrap() []error }:
		var all []*Waiting
		for _, one := range e.Unwrap() {
			all = append(all, Missing(one)...)
		}
		return all
	}
	return nil
}

// New makes the folder of the pods.
func New(cfg Config) (*Volumes, error) {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.HostsFile == "" {
		cfg.HostsFile = hostsPath
	}
	if err := os.MkdirAll(cfg.Dir, 0o750); err != nil {
		return nil, fmt.Errorf("make the folder of the pods: %w", err)
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir) // as the kernel names mounts
	}
	if err != nil {
		return nil, fmt.Errorf("find the folder of the pods: %w", err)
	}
	cfg.Dir = dir
	if alone(dir, "/proc/1/ns/mnt") {
		cfg.Log.Error("the agent has a mount namespace of its own: containers will find their secrets and memory volumes empty. "+
			"Run it without what makes one (systemd: PrivateTmp, ProtectSystem, PrivateMounts and the like; a container: mountPropagation Bidirectional)", "dir", dir)
	}
	return &Volumes{cfg, selinuxEnabled()}, nil
}

// alone tells whether what is mounted below the folder stays unseen in the mount
// namespace that is the host's. What cannot be known is no.
func alone(dir, namespace string) bool {
	own, err1 := os.Readlink("/proc/self/ns/mnt")
	host, err2 := os.Readlink(namespace)
	if err1 != nil || err2 != nil || own == host {
		return false
	}
	above, err := mountinfo.GetMounts(mountinfo.ParentsFilter(dir))
	if err != nil || len(above) == 0 {
		return false
	}
	slices.SortStableFunc(above, func(a, b *mountinfo.Info) int { return len(a.Mountpoint) - len(b.Mountpoint) })
	return !strings.Contains(above[len(above)-1].Optional, "shared:")
}

// podDir is the folder of a pod.
func (v *Volumes) podDir(uid types.UID) (string, error) {
	if !plain(string(uid)) {
		return "", fmt.Errorf("pod uid %q: want one that can name a folder", uid)
	}
	return filepath.Join(v.cfg.Dir, string(uid)), nil
}

// plain tells whether a name stays in the folder that it is put in.
func plain(name string) bool {
	return name != "" && !strings.HasPrefix(name, ".") && !strings.ContainsAny(name, "/\x00") && len(name) < 256
}

// Pods are those that have a folder, whatever is in it.
func (v *Volumes) Pods() ([]types.UID, error) {
	entries, err := os.ReadDir(v.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("list the folders of the pods: %w", err)
	}
	var uids []types.UID
	for _, e := range entries {
		if e.IsDir() && plain(e.Name()) {
			uids = append(uids, types.UID(e.Name()))
		}
	}
	return uids, nil
}

// SetUp makes the volumes that the pod's containers mount, those that are missing:
// it may be called again at any time. One volume does not wait for another: the
// error is about all that are not there, see Missing. Errors are worth a retry,
// but for those about what an edge node does not serve, which say so.
func (v *Volumes) SetUp(ctx context.Context, pod *corev1.Pod) error {
	dir, err := v.podDir(pod.UID)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "volumes"), 0o750); err != nil {
		return fmt.Errorf("make the folder of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	reached("pod folder")
	var errs []error
	for _, vol := range mounted(pod) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := v.setUp(pod, vol); err != nil {
			errs = append(errs, waiting(vol.Name, err))
		}
	}
	return errors.Join(errs...)
}

// Update brings what has changed into the configMap, secret, projected and
// downwardAPI volumes of a running pod; containers see all of a volume's change or
// nothing. What cannot be had now stays as it is. The time says when to look again
// even if nothing is heard of: a token is due; zero is never.
func (v *Volumes) Update(pod *corev1.Pod) (next time.Time, err error) {
	var errs []error
	for _, vol := range mounted(pod) {
		if vol.ConfigMap == nil && vol.Secret == nil && vol.Projected == nil && vol.DownwardAPI == nil {
			continue
		}
		due, err := v.setUp(pod, vol)
		if err != nil {
			errs = append(errs, waiting(vol.Name, err))
		}
		if next.IsZero() || !due.IsZero() && due.Before(next) {
			next = due
		}
	}
	return next, errors.Join(errs...)
}

// setUp makes one volume, and says when a token in it is due.
func (v *Volumes) setUp(pod *corev1.Pod, vol *corev1.Volume) (due time.Time, err error) {
	if !plain(vol.Name) {
		return due, errors.New("the name of a volume must be able to name a folder")
	}
	switch {
	case vol.ConfigMap != nil, vol.Secret != nil, vol.Projected != nil, vol.DownwardAPI != nil:
		return v.setUpContent(pod, vol)
	case vol.EmptyDir != nil:
		return due, v.setUpEmptyDir(pod, vol)
	case vol.HostPath != nil:
		return due, checkHostPath(vol.HostPath)
	case vol.Image != nil:
		if v.cfg.ImageVolumes == nil || !v.cfg.ImageVolumes() {
			return due, errors.New("the container runtime of this node does not mount images (containerd does from 2.1 on, CRI-O from 1.31)")
		}
		return due, nil
	}
	return due, fmt.Errorf("an edge node does not serve volumes of type %s; it serves %s", typeOf(vol), served)
}

func (v *Volumes) allocatable() corev1.ResourceList {
	if v.cfg.Allocatable == nil {
		return nil
	}
	return v.cfg.Allocatable()
}

// typeOf names the field of the volume's source, as in a manifest.
func typeOf(vol *corev1.Volume) string {
	s := reflect.ValueOf(vol.VolumeSource)
	for i := range s.NumField() {
		if f := s.Field(i); f.Kind() == reflect.Pointer && !f.IsNil() {
			name, _, _ := strings.Cut(s.Type().Field(i).Tag.Get("json"), ",")
			return name
		}
	}
	return "unknown"
}

// mounted are the volumes that a container mounts. The others are not made, as by
// the stock kubelet.
func mounted(pod *corev1.Pod) []*corev1.Volume {
	used := map[string]bool{}
	for c := range containers(pod) {
		for _, m := range c.VolumeMounts {
			used[m.Name] = true
		}
		for _, d := range c.VolumeDevices {
			used[d.Name] = true
		}
	}
	var vols []*corev1.Volume
	for i := range pod.Spec.Volumes {
		if vol := &pod.Spec.Volumes[i]; used[vol.Name] {
			vols = append(vols, vol)
		}
	}
	return vols
}

// containers goes over all containers of the pod, of any kind.
func containers(pod *corev1.Pod) func(yield func(*corev1.Container) bool) {
	return func(yield func(*corev1.Container) bool) {
		for i := range pod.Spec.InitContainers {
			if !yield(&pod.Spec.InitContainers[i]) {
				return
			}
		}
		for i := range pod.Spec.Containers {
			if !yield(&pod.Spec.Containers[i]) {
				return
			}
		}
		for i := range pod.Spec.EphemeralContainers {
			if !yield((*corev1.Container)(&pod.Spec.EphemeralContainers[i].EphemeralContainerCommon)) {
				return
			}
		}
	}
}

// path is the folder of a volume that is kept below the pod's, "" for other types.
func (v *Volumes) path(pod *corev1.Pod, vol *corev1.Volume) string {
	kind := ""
	switch {
	case vol.ConfigMap != nil:
		kind = configMapKind
	case vol.Secret != nil:
		kind = secretKind
	case vol.Projected != nil:
		kind = projectedKind
	case vol.DownwardAPI != nil:
		kind = downwardAPIKind
	case vol.EmptyDir != nil:
		kind = emptyDirKind
	default:
		return ""
	}
	return filepath.Join(v.cfg.Dir, string(pod.UID), "volumes", kind, vol.Name)
}

// fsGroup is the group that owns the pod's volumes, nil where none was asked for. It
// is given when they are made: fsGroupChangePolicy is about volumes that outlive pods.
func fsGroup(pod *corev1.Pod) *int64 {
	if pod.Spec.SecurityContext == nil {
		return nil
	}
	return pod.Spec.SecurityContext.FSGroup
}

// reached is called after each step that changes the file system: the tests kill
// the process there.
var reached = func(step string) {}
