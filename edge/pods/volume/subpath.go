package volume

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// subPath binds what the path leads to in the volume to a place in the pod's
// folder, which is what the runtime gets: no container can make another thing of
// it. What is missing is made a folder. The error hides what it is about, as the
// text goes to those who must not know the host's file system; the log does not.
func (v *Volumes) subPath(podDir, volume, container string, index int, base, sub string) (string, error) {
	if err := makeBeneath(base, sub); err != nil {
		v.cfg.Log.Warn("make the folder of a subPath", "path", filepath.Join(base, sub), "container", container, "err", err)
		return "", outOfRoom(fmt.Errorf("failed to create subPath directory for volumeMount %q of container %q", volume, container), err)
	}
	target := filepath.Join(podDir, "subpaths", volume, container, strconv.Itoa(index))
	if err := bindBeneath(base, sub, target); err != nil {
		v.cfg.Log.Warn("bind a subPath", "path", filepath.Join(base, sub), "container", container, "err", err)
		return "", outOfRoom(fmt.Errorf("failed to prepare subPath for volumeMount %q of container %q", volume, container), err)
	}
	return target, nil
}

// outOfRoom adds to the error that there is no room, which tells nobody anything of the host.
func outOfRoom(err, cause error) error {
	for _, no := range []error{unix.ENOSPC, unix.EDQUOT} {
		if errors.Is(cause, no) {
			return fmt.Errorf("%w: %w", err, no)
		}
	}
	return err
}

// envFile is the most of a file that ReadFile reads.
const envFile = 1 << 20

// ReadFile reads a file of at most 1 MiB in a volume of the pod, for fileKeyRef.
func (v *Volumes) ReadFile(pod *corev1.Pod, volume, path string) ([]byte, error) {
	at := slices.IndexFunc(pod.Spec.Volumes, func(vol corev1.Volume) bool { return vol.Name == volume })
	if at < 0 || !plain(volume) {
		return nil, fmt.Errorf("cannot find the volume %q", volume)
	}
	dir := v.path(pod, &pod.Spec.Volumes[at])
	if dir == "" || filepath.IsAbs(path) || backsteps(path) {
		return nil, fmt.Errorf("volume %q has no file %q to be read", volume, path)
	}
	fd, err := openBeneath(dir, path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > envFile {
		return nil, errors.Join(err, fmt.Errorf("volume %q: %s is not a file of at most %d bytes", volume, path, envFile))
	}
	f, err := os.Open("/proc/self/fd/" + strconv.Itoa(fd)) // a place becomes a file
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return io.ReadAll(io.LimitReader(f, envFile))
}

// openBeneath opens a path below base, as a place (O_PATH) that can be bound.
// Symlinks are resolved first; then each step is opened from the one before and must
// not be a symlink any more, so that nobody who changes the tree meanwhile leads
// outside of base.
func openBeneath(base, sub string) (fd int, err error) {
	if base, err = filepath.EvalSymlinks(base); err != nil {
		return -1, err
	}
	full, err := filepath.EvalSymlinks(filepath.Join(base, sub))
	if err != nil {
		return -1, err
	}
	rel, err := filepath.Rel(base, full)
	if err != nil || !filepath.IsLocal(rel) {
		return -1, fmt.Errorf("%s leads to %s, outside of the volume", filepath.Join(base, sub), full)
	}
	reached("resolved")
	fd, err = unix.Open(base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: base, Err: err}
	}
	for part := range strings.SplitSeq(rel, "/") {
		if part == "." {
			continue
		}
		next, err := openStep(fd, part, unix.O_PATH)
		_ = unix.Close(fd)
		if err != nil {
			return -1, fmt.Errorf("%s: %w", full, err)
		}
		fd = next
	}
	return fd, nil
}

// openStep opens a name in an open folder, unless it is a symlink.
func openStep(dir int, name string, flags int) (int, error) {
	fd, err := unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT == unix.S_IFLNK {
		_ = unix.Close(fd)
		return -1, &fs.PathError{Op: "open", Path: name, Err: errors.Join(err, unix.ELOOP)}
	}
	return fd, nil
}

// makeBeneath makes the folders that are missing on the path below base, with the
// mode of base: its group and setgid bit reach what is made below.
func makeBeneath(base, sub string) error {
	var parts []string
	for part := range strings.SplitSeq(filepath.Clean(sub), "/") {
		if part != "." {
			parts = append(parts, part)
		}
	}
	n := len(parts)
	for ; n >= 0; n-- {
		_, err := os.Stat(filepath.Join(append([]string{base}, parts[:n]...)...))
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) || n == 0 {
			return err
		}
	}
	if n == len(parts) {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(base, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: base, Err: err}
	}
	fd, err := openBeneath(base, filepath.Join(parts[:n]...))
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	for _, part := range parts[n:] {
		err := unix.Mkdirat(fd, part, st.Mode&0o7777)
		made := err == nil
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return &fs.PathError{Op: "mkdir", Path: part, Err: err}
		}
		next, err := openStep(fd, part, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		_ = unix.Close(fd)
		fd = next
		if made {
			if err := unix.Fchmod(fd, st.Mode&0o7777); err != nil {
				return &fs.PathError{Op: "chmod", Path: part, Err: err}
			}
			reached("subPath folder")
		}
	}
	return nil
}

// bindBeneath binds a path below base to the target, unless it is bound there. What
// else is bound there is of a container before, and is let go.
func bindBeneath(base, sub, target string) error {
	fd, err := openBeneath(base, sub)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	var src, dst unix.Stat_t
	if err := unix.Fstat(fd, &src); err != nil {
		return err
	}
	// The target's own inode is nowhere else: the same one means that it is bound.
	if err := unix.Lstat(target, &dst); err == nil && dst.Dev == src.Dev && dst.Ino == src.Ino {
		return nil
	}
	for {
		// Private first: what is mounted below it stays on the host, see unmount.
		err := unix.Mount("", target, "", unix.MS_PRIVATE|unix.MS_REC, "")
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // not a mount point, or not there
		}
		if err == nil {
			err = unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		if err != nil {
			return &fs.PathError{Op: "unmount", Path: target, Err: err}
		}
	}
	isDir := src.Mode&unix.S_IFMT == unix.S_IFDIR
	if info, err := os.Lstat(target); err == nil && info.IsDir() != isDir {
		if err := os.Remove(target); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
		return err
	}
	if isDir {
		err = os.Mkdir(target, 0o750)
	} else {
		var f *os.File // a file can be the mount point of all that is no folder
		if f, err = os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o640); err == nil {
			err = f.Close()
		}
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	reached("subPath target")
	if err := unix.Mount("/proc/self/fd/"+strconv.Itoa(fd), target, "", unix.MS_BIND, ""); err != nil {
		return &fs.PathError{Op: "bind", Path: target, Err: err}
	}
	reached("bound")
	return nil
}
