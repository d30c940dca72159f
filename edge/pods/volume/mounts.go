package volume

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	hostsPath = "/etc/hosts"
	// messageFiles is how many termination messages of a container are kept. A dead
	// container is looked at once or twice; a crash loop is no reason to fill the disk.
	messageFiles = 8
)

// MountInput is what the mounts of a container are made of.
type MountInput struct {
	Pod *corev1.Pod
	// Container is one of any kind.
	Container *corev1.Container
	// Expand replaces $(VAR) in a subPathExpr by the container's environment. Its
	// error, such as "missing value for NAME", says what there is not.
	Expand func(string) (string, error)
	// Hosts is the file to have as /etc/hosts, see Volumes.Hosts. Empty is none.
	Hosts string
	// Images are the pulled images of the image volumes, by the volume's name.
	Images map[string]*runtimeapi.ImageSpec
}

// Mounts are the mounts of a container that is about to be made: its volumes,
// /etc/hosts, and a new file for its termination message. What subPaths lead to is
// bound below the pod's folder. The errors are for CreateContainerConfigError.
func (v *Volumes) Mounts(in MountInput) ([]*runtimeapi.Mount, error) {
	pod, c := in.Pod, in.Container
	dir, err := v.podDir(pod.UID)
	if err != nil {
		return nil, err
	}
	if !plain(c.Name) {
		return nil, fmt.Errorf("the name of container %q must be able to name a folder", c.Name)
	}
	var mounts []*runtimeapi.Mount
	labelled := map[string]bool{}
	for i, m := range c.VolumeMounts {
		at := slices.IndexFunc(pod.Spec.Volumes, func(vol corev1.Volume) bool { return vol.Name == m.Name })
		if at < 0 || !plain(m.Name) {
			return nil, fmt.Errorf("cannot find volume %q to mount into container %q", m.Name, c.Name)
		}
		vol := &pod.Spec.Volumes[at]
		sub := m.SubPath
		if m.SubPathExpr != "" {
			if sub, err = in.Expand(m.SubPathExpr); err != nil {
				return nil, err
			}
		}
		if filepath.IsAbs(sub) {
			return nil, fmt.Errorf("error SubPath `%s` must not be an absolute path", sub)
		}
		if backsteps(sub) {
			return nil, fmt.Errorf("unable to provision SubPath `%s`: %w", sub, errBacksteps)
		}
		own := v.path(pod, vol)
		mount := &runtimeapi.Mount{
			ContainerPath: filepath.Join("/", m.MountPath),
			HostPath:      own,
			Readonly:      m.ReadOnly || own != "" && vol.EmptyDir == nil,
			MountOptions:  m.BindMountOptions,
			// SELinux: the agent's own volumes are the pod's alone, once is enough.
			SelinuxRelabel: v.selinux && own != "" && !labelled[m.Name],
		}
		labelled[m.Name] = true
		if mount.Propagation, err = propagation(m.MountPropagation); err != nil {
			return nil, err
		}
		if mount.RecursiveReadOnly, err = v.recursiveReadOnly(pod, m); err != nil {
			return nil, fmt.Errorf("failed to resolve recursive read-only mode: %w", err)
		}
		switch {
		case vol.Image != nil:
			if mount.Image = in.Images[m.Name]; mount.Image == nil {
				return nil, fmt.Errorf("the image of volume %q, which container %q mounts, has not been pulled", m.Name, c.Name)
			}
			mount.Readonly, mount.ImageSubPath = true, sub
		case vol.HostPath != nil:
			mount.HostPath = vol.HostPath.Path
		case own == "":
			return nil, fmt.Errorf("cannot find volume %q to mount into container %q", m.Name, c.Name)
		}
		if sub != "" && vol.Image == nil {
			if mount.HostPath, err = v.subPath(dir, m.Name, c.Name, i, mount.HostPath, sub); err != nil {
				return nil, err
			}
		}
		mounts = append(mounts, mount)
	}
	if in.Hosts != "" && !slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == hostsPath }) {
		mounts = append(mounts, &runtimeapi.Mount{ContainerPath: hostsPath, HostPath: in.Hosts, SelinuxRelabel: v.selinux})
	}
	if c.TerminationMessagePath != "" {
		// A container without this file is better than none on a full disk.
		if file, err := messageFile(filepath.Join(dir, "containers", c.Name)); err != nil {
			v.cfg.Log.Warn("make the file for the termination message", "pod", pod.Name, "namespace", pod.Namespace, "container", c.Name, "err", err)
		} else {
			mounts = append(mounts, &runtimeapi.Mount{ContainerPath: filepath.Join("/", c.TerminationMessagePath), HostPath: file, SelinuxRelabel: v.selinux})
		}
	}
	return mounts, nil
}

func propagation(mode *corev1.MountPropagationMode) (runtimeapi.MountPropagation, error) {
	switch {
	case mode == nil || *mode == corev1.MountPropagationNone:
		return runtimeapi.MountPropagation_PROPAGATION_PRIVATE, nil
	case *mode == corev1.MountPropagationHostToContainer:
		return runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, nil
	case *mode == corev1.MountPropagationBidirectional:
		return runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL, nil
	}
	return 0, fmt.Errorf("invalid MountPropagation mode: %q", *mode)
}

func (v *Volumes) recursiveReadOnly(pod *corev1.Pod, m corev1.VolumeMount) (bool, error) {
	if m.RecursiveReadOnly == nil || *m.RecursiveReadOnly == corev1.RecursiveReadOnlyDisabled {
		return false, nil
	}
	if !m.ReadOnly {
		return false, fmt.Errorf("volume %q requested recursive read-only mode, but it is not read-only", m.Name)
	}
	if p := m.MountPropagation; p != nil && *p != corev1.MountPropagationNone {
		return false, fmt.Errorf("volume %q requested recursive read-only mode, but it is not compatible with propagation %q", m.Name, *p)
	}
	can := v.cfg.RecursiveReadOnly != nil && v.cfg.RecursiveReadOnly(pod)
	switch mode := *m.RecursiveReadOnly; {
	case mode == corev1.RecursiveReadOnlyIfPossible:
		return can, nil
	case mode != corev1.RecursiveReadOnlyEnabled:
		return false, fmt.Errorf("unknown recursive read-only mode %q", mode)
	case !can:
		return false, fmt.Errorf("volume %q requested recursive read-only mode, but it is not supported by the runtime", m.Name)
	}
	return true, nil
}

// messageFile makes a file for the termination message of one instance of a
// container, and removes those of instances long gone.
func messageFile(dir string) (string, error) {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return "", err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	if len(entries) >= messageFiles {
		var old []fs.FileInfo
		for _, e := range entries {
			if info, err := e.Info(); err == nil {
				old = append(old, info)
			}
		}
		slices.SortFunc(old, func(a, b fs.FileInfo) int { return cmp.Compare(b.ModTime().UnixNano(), a.ModTime().UnixNano()) })
		for _, info := range old[min(messageFiles-1, len(old)):] {
			_ = os.Remove(filepath.Join(dir, info.Name())) // the next one tries again
		}
	}
	name := filepath.Join(dir, fmt.Sprintf("%08x", rand.Uint32()))
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o666)
	if err != nil {
		return "", err
	}
	if err := errors.Join(f.Chmod(0o666), f.Close()); err != nil {
		_ = os.Remove(name)
		return "", err
	}
	reached("message file")
	return name, nil
}

// selinuxEnabled tells whether the runtime can be asked to label files.
func selinuxEnabled() bool {
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/selinux", &st); err != nil || uint32(st.Type) != unix.SELINUX_MAGIC {
		return false
	}
	label, err := os.ReadFile("/proc/self/attr/current")
	return err == nil && strings.TrimRight(string(label), "\x00") != "kernel"
}
