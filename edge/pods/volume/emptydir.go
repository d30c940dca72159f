package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	helper "k8s.io/component-helpers/resource"
)

func (v *Volumes) setUpEmptyDir(pod *corev1.Pod, vol *corev1.Volume) error {
	return v.makeDir(pod, v.path(pod, vol), *vol.EmptyDir)
}

// makeDir makes an empty volume, unless it is there: whatever containers have put
// into it and made of it since stays as it is. The modes are those that containers
// see under the stock kubelet.
func (v *Volumes) makeDir(pod *corev1.Pod, dir string, e corev1.EmptyDirVolumeSource) error {
	group := fsGroup(pod)
	mode := func(bits uint32) uint32 {
		if e.Mode != nil {
			bits = uint32(*e.Mode) & 0o1777
		}
		if group != nil {
			bits |= 0o2770
		}
		return bits
	}
	switch medium := e.Medium; {
	case medium == corev1.StorageMediumDefault:
		return makeOnDisk(dir, mode(0o777), group)
	case medium == corev1.StorageMediumMemory:
		opts := mountOptions(mode(0o1777), group)
		if size := v.tmpfsSize(pod, e.SizeLimit); size > 0 {
			opts += fmt.Sprintf(",size=%d", size)
		}
		_, err := makeMount(dir, "tmpfs", unix.TMPFS_MAGIC, opts, ",noswap")
		return err
	case isHugePages(medium):
		size, err := pageSize(pod, medium)
		if err != nil {
			return err
		}
		opts := fmt.Sprintf("%s,pagesize=%d", mountOptions(mode(0o755), group), size)
		fresh, err := makeMount(dir, "hugetlbfs", unix.HUGETLBFS_MAGIC, opts, "")
		if err == nil && fresh { // its option mode knows no setgid
			err = unix.Chmod(dir, mode(0o755))
		}
		if err != nil {
			return err
		}
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			return &fs.PathError{Op: "statfs", Path: dir, Err: err}
		}
		if is := int64(st.Bsize); is != size { //nolint:unconvert // int32 on some platforms
			return fmt.Errorf("%s is mounted with pages of %d bytes, medium %s wants %d", dir, is, medium, size)
		}
		return nil
	}
	return fmt.Errorf("unknown storage medium %q", e.Medium)
}

// makeOnDisk makes the folder under another name first: once it has its own, it
// has its owner and mode, and is never touched again.
func makeOnDisk(dir string, mode uint32, group *int64) error {
	if info, err := os.Lstat(dir); err == nil {
		if !info.IsDir() {
			return &fs.PathError{Op: "make the volume", Path: dir, Err: unix.ENOTDIR}
		}
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o750); err != nil {
		return err
	}
	made := filepath.Join(filepath.Dir(dir), "."+filepath.Base(dir)) // no volume is named so
	if err := os.Mkdir(made, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	reached("new volume")
	if group != nil {
		if err := os.Lchown(made, -1, int(*group)); err != nil {
			return err
		}
	}
	if err := unix.Chmod(made, mode); err != nil { // not os.Mkdir's: the umask
		return &fs.PathError{Op: "chmod", Path: made, Err: err}
	}
	err := os.Rename(made, dir)
	reached("volume")
	return err
}

// makeMount mounts a file system in memory, unless it is. The extra option is for
// kernels that know it.
func makeMount(dir, fstype string, magic uint32, opts, extra string) (fresh bool, err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o750); err != nil {
		return false, err
	}
	if err := os.Mkdir(dir, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	reached("mount point")
	if is, err := isMounted(dir, magic); err != nil || is {
		return false, err
	}
	err = unix.Mount(fstype, dir, fstype, 0, opts+extra)
	if errors.Is(err, unix.EINVAL) && extra != "" {
		err = unix.Mount(fstype, dir, fstype, 0, opts)
	}
	if err != nil {
		return false, &fs.PathError{Op: "mount " + fstype + " (" + opts + ")", Path: dir, Err: err}
	}
	reached("mounted")
	return true, nil
}

// isMounted tells whether a file system of the type begins at the folder.
func isMounted(dir string, magic uint32) (bool, error) {
	var st unix.Statfs_t
	var here, above unix.Stat_t
	if err := errors.Join(unix.Statfs(dir, &st), unix.Lstat(dir, &here), unix.Lstat(filepath.Dir(dir), &above)); err != nil {
		return false, &fs.PathError{Op: "look for a mount", Path: dir, Err: err}
	}
	return uint32(st.Type) == magic && here.Dev != above.Dev, nil
}

// inMemory makes sure that what is written to the folder is not written to a disk.
func inMemory(root *os.Root) error {
	f, err := root.Open(".")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return err
	}
	if uint32(st.Type) != unix.TMPFS_MAGIC {
		return errors.New("not a tmpfs: a secret is not written there")
	}
	return nil
}

func mountOptions(mode uint32, group *int64) string {
	if group != nil {
		return fmt.Sprintf("mode=%o,gid=%d", mode, *group)
	}
	return fmt.Sprintf("mode=%o", mode)
}

// tmpfsSize is how many bytes a volume in memory may hold: what the node can give,
// the pod's memory limit or the volume's own limit, whichever is least. 0 is no bound.
func (v *Volumes) tmpfsSize(pod *corev1.Pod, limit *resource.Quantity) int64 {
	var size int64
	least := func(n int64) {
		if n > 0 && (size == 0 || n < size) {
			size = n
		}
	}
	list := v.allocatable()
	least(list.Memory().Value())
	// The pod has a limit where it states one, or all its containers do.
	limited := pod.Spec.Resources != nil && !pod.Spec.Resources.Limits.Memory().IsZero()
	if !limited {
		limited = true
		for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
			for i := range list {
				limited = limited && !list[i].Resources.Limits.Memory().IsZero()
			}
		}
	}
	if limited {
		limits := helper.PodLimits(pod, helper.PodResourcesOptions{})
		least(limits.Memory().Value())
	}
	if limit != nil {
		least(limit.Value())
	}
	return size
}

func isHugePages(m corev1.StorageMedium) bool {
	return m == corev1.StorageMediumHugePages || strings.HasPrefix(string(m), string(corev1.StorageMediumHugePagesPrefix))
}

// pageSize is the size of the pages that the medium is made of, in bytes: the one
// that it names, of which the pod must ask for some, or the only one that the pod asks for.
func pageSize(pod *corev1.Pod, medium corev1.StorageMedium) (int64, error) {
	var lists []corev1.ResourceList
	if pod.Spec.Resources != nil {
		lists = append(lists, pod.Spec.Resources.Requests)
	}
	for _, cs := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		for i := range cs {
			lists = append(lists, cs[i].Resources.Requests)
		}
	}
	var named, found int64
	if medium != corev1.StorageMediumHugePages {
		q, err := resource.ParseQuantity(strings.TrimPrefix(string(medium), string(corev1.StorageMediumHugePagesPrefix)))
		if err != nil {
			return 0, fmt.Errorf("medium %s: %w", medium, err)
		}
		named = q.Value()
	}
	for _, list := range lists {
		for name := range list {
			text, ok := strings.CutPrefix(string(name), corev1.ResourceHugePagesPrefix)
			if !ok {
				continue
			}
			q, err := resource.ParseQuantity(text)
			if err != nil {
				return 0, fmt.Errorf("resource %s: %w", name, err)
			}
			size := q.Value()
			switch {
			case named != 0 && size != named:
			case found != 0 && size != found:
				return 0, fmt.Errorf("medium: %s can't be used if container requests multiple huge page sizes", medium)
			default:
				found = size
			}
		}
	}
	if found == 0 {
		return 0, fmt.Errorf("medium %s: hugePages storage requested, but there is no resource request for huge pages", medium)
	}
	return found, nil
}
