package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
)

// unmountRounds bounds how often the mounts of a pod are looked through: more than
// one is needed where mounts lie on one another.
const unmountRounds = 16

// TearDown unmounts and removes all that a pod has in its folder. It is for pods
// whose containers are gone: mounts that are busy all the same are detached. It may
// be called again at any time; a pod that has no folder is no error.
func (v *Volumes) TearDown(ctx context.Context, uid types.UID) error {
	dir, err := v.podDir(uid)
	if err != nil {
		return err
	}
	if err := v.unmount(dir); err != nil {
		return fmt.Errorf("tear down the volumes of pod %s: %w", uid, err)
	}
	if err := removeTree(ctx, v.cfg.Dir, string(uid)); err != nil {
		return fmt.Errorf("remove the folder of pod %s: %w", uid, err)
	}
	return nil
}

// unmount takes away all mounts below the folder, those first that lie on others.
func (v *Volumes) unmount(dir string) error {
	for range unmountRounds {
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
		if err != nil {
			return fmt.Errorf("list the mounts below %s: %w", dir, err)
		}
		if len(mounts) == 0 {
			return nil
		}
		// No mount or unmount below them is to reach those on the host that they are
		// peers of, such as a shared hostPath.
		for _, m := range mounts {
			_ = unix.Mount("", m.Mountpoint, "", unix.MS_PRIVATE, "") // fails where another is on top: there is another round
		}
		slices.Reverse(mounts)
		slices.SortStableFunc(mounts, func(a, b *mountinfo.Info) int { return len(b.Mountpoint) - len(a.Mountpoint) })
		for _, m := range mounts {
			flags := unix.UMOUNT_NOFOLLOW
			if m.FSType != "tmpfs" && m.FSType != "hugetlbfs" {
				flags |= unix.MNT_DETACH // a server that does not answer must not hang the agent
			}
			err := unix.Unmount(m.Mountpoint, flags)
			if errors.Is(err, unix.EBUSY) {
				v.cfg.Log.Info("a volume is busy: it is detached", "path", m.Mountpoint)
				err = unix.Unmount(m.Mountpoint, flags|unix.MNT_DETACH)
			}
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return &fs.PathError{Op: "unmount", Path: m.Mountpoint, Err: err}
			}
			reached("unmounted")
		}
	}
	return fmt.Errorf("%s: there are still mounts below it after %d rounds", dir, unmountRounds)
}

// deepest is how many folders are open at most while a tree is walked.
const deepest = 64

// remover removes a tree that hostile programs may have made, step by step from one
// open folder to the next: no symlink is followed and no mount is entered.
type remover struct {
	ctx  context.Context
	path string // of the tree
	root int    // the tree's folder
	// moved are folders that lay too deep, and were moved to root under these names.
	moved []string
}

// removeTree removes dir/name and all below it. It fails where something is still
// mounted there, and leaves what is mounted alone.
func removeTree(ctx context.Context, dir, name string) error {
	top, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer func() { _ = unix.Close(top) }()
	r := &remover{ctx: ctx, path: filepath.Join(dir, name), root: -1}
	return r.remove(top, name, 0)
}

func (r *remover) remove(dir int, name string, depth int) error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	err := unix.Unlinkat(dir, name, 0)
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		reached("removed")
		return nil
	case !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM):
		return r.fail("remove", name, err)
	}
	reached("folder found")
	fd, err := openFolder(dir, name)
	switch {
	case errors.Is(err, unix.EXDEV):
		return r.fail("remove", name, errors.New("it is still a mount point, nothing in it is removed"))
	case errors.Is(err, unix.ENOTDIR): // a file that may not be removed
		return r.fail("remove", name, unix.EPERM)
	case err != nil:
		return r.fail("open", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer func() { _ = f.Close() }()
	if depth == 0 {
		r.root = fd
	}
	if err := r.clear(f, depth); err != nil {
		return err
	}
	for depth == 0 && len(r.moved) > 0 {
		next := r.moved[len(r.moved)-1]
		r.moved = r.moved[:len(r.moved)-1]
		if err := r.remove(fd, next, 1); err != nil {
			return err
		}
	}
	if err := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		return r.fail("remove", name, err)
	}
	reached("removed")
	return nil
}

// clear removes what is in an open folder.
func (r *remover) clear(f *os.File, depth int) error {
	fd := int(f.Fd())
	for {
		names, err := f.Readdirnames(512)
		if err != nil && !errors.Is(err, io.EOF) {
			return r.fail("list", f.Name(), err)
		}
		if len(names) == 0 {
			return nil
		}
		for _, name := range names {
			if depth+1 < deepest || unix.Unlinkat(fd, name, 0) == nil {
				if err := r.remove(fd, name, depth+1); err != nil {
					return err
				}
				continue
			}
			up := fmt.Sprintf(".deep.%016x", rand.Uint64())
			if err := unix.Renameat(fd, name, r.root, up); err != nil {
				return r.fail("move", name, err)
			}
			r.moved = append(r.moved, up)
		}
	}
}

func (r *remover) fail(op, name string, err error) error {
	return fmt.Errorf("%s %s in %s: %w", op, name, r.path, err)
}

const folderFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC

// openFolder opens a folder in an open one for reading; not through a symlink, and
// not where something is mounted: EXDEV.
var openFolder = func(dir int, name string) (int, error) {
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{Flags: folderFlags, Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_BENEATH})
	if !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
		return fd, err
	}
	return openFolderByMount(dir, name) // before Linux 5.6, or where a filter refuses the call
}

// openFolderByMount compares the mounts that the two folders lie on.
func openFolderByMount(dir int, name string) (int, error) {
	fd, err := unix.Openat(dir, name, folderFlags, 0)
	if err != nil {
		return -1, err
	}
	here, err1 := mountID(fd)
	above, err2 := mountID(dir)
	if err := errors.Join(err1, err2); err != nil || here != above {
		_ = unix.Close(fd)
		if err == nil {
			err = unix.EXDEV
		}
		return -1, err
	}
	return fd, nil
}

// mountID names the mount that an open file lies on.
func mountID(fd int) (string, error) {
	text, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strings.TrimSpace(id), nil
		}
	}
	return "", errors.New("fdinfo has no mnt_id")
}
