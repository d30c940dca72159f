package volume

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
)

// Used is what a volume takes.
type Used struct {
	Bytes  int64
	Inodes int64
	// Memory says that it takes them of memory, not of the disk.
	Memory bool
}

// Usage is what the emptyDir, configMap and downwardAPI volumes of a pod take, by
// the volume's name. Volumes on disk are walked through, at a cost that grows with
// their files; what lies deeper in them than 64 folders is not counted.
func (v *Volumes) Usage(uid types.UID) (map[string]Used, error) {
	dir, err := v.podDir(uid)
	if err != nil {
		return nil, err
	}
	all := map[string]Used{}
	for _, kind := range []string{emptyDirKind, configMapKind, downwardAPIKind} {
		folder := filepath.Join(dir, "volumes", kind)
		entries, err := os.ReadDir(folder)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if !plain(e.Name()) {
				continue
			}
			used, err := usage(filepath.Join(folder, e.Name()))
			if errors.Is(err, fs.ErrNotExist) {
				continue // torn down meanwhile
			}
			if err != nil {
				return nil, fmt.Errorf("measure volume %s of pod %s: %w", e.Name(), uid, err)
			}
			all[e.Name()] = used
		}
	}
	return all, nil
}

func usage(dir string) (Used, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return Used{}, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	f := os.NewFile(uintptr(fd), dir)
	defer func() { _ = f.Close() }()
	for _, magic := range []uint32{unix.TMPFS_MAGIC, unix.HUGETLBFS_MAGIC} {
		is, err := isMounted(dir, magic)
		if err != nil {
			return Used{}, err
		}
		if is { // a file system of its own knows
			var st unix.Statfs_t
			if err := unix.Fstatfs(fd, &st); err != nil {
				return Used{}, err
			}
			return Used{
				Bytes:  int64(st.Blocks-st.Bfree) * int64(st.Bsize), //nolint:unconvert // int32 on some platforms
				Inodes: int64(st.Files - st.Ffree),
				Memory: true,
			}, nil
		}
	}
	u := &used{seen: map[uint64]bool{}}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Used{}, err
	}
	u.count(&st)
	err = u.walk(f, 0)
	return u.Used, err
}

type used struct {
	Used
	seen map[uint64]bool // inodes with several names
}

func (u *used) count(st *unix.Stat_t) {
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if u.seen[st.Ino] {
			return
		}
		u.seen[st.Ino] = true
	}
	u.Bytes += st.Blocks * 512
	u.Inodes++
}

// walk counts what is in the folder. What vanishes meanwhile is not counted.
func (u *used) walk(f *os.File, depth int) error {
	dir := int(f.Fd())
	for {
		names, err := f.Readdirnames(512)
		if len(names) == 0 {
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			return nil
		}
		for _, name := range names {
			var st unix.Stat_t
			if unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
				continue
			}
			if st.Mode&unix.S_IFMT != unix.S_IFDIR {
				u.count(&st)
				continue
			}
			if depth+1 >= deepest {
				continue
			}
			fd, err := openFolder(dir, name)
			if err != nil {
				continue // gone, or a mount
			}
			u.count(&st)
			sub := os.NewFile(uintptr(fd), name)
			err = u.walk(sub, depth+1)
			_ = sub.Close()
			if err != nil {
				return err
			}
		}
	}
}
