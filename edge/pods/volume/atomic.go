package volume

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"strings"
	"time"
)

// What a volume with content looks like, as the stock kubelet's; programs in
// containers watch the name ..data:
//
//	..2026_09_21_08_00_00.123456789/tls.crt    the content
//	..data -> ..2026_09_21_08_00_00.123456789  replaced by rename
//	tls.crt -> ..data/tls.crt
const (
	dataLink    = "..data"
	newDataLink = "..data_tmp"
)

// file is one file of a volume.
type file struct {
	data []byte
	mode fs.FileMode
	// owner is the user who owns it; nil is root.
	owner *int64
}

// payload is a volume's content by path. The keys are clean and relative.
type payload map[string]file

// add puts a file where the pod wants it. A later one at the same path wins.
func (p payload) add(name string, f file) error {
	switch {
	case name == "":
		return errors.New(`invalid path: must not be empty: ""`)
	case path.IsAbs(name):
		return fmt.Errorf("invalid path: must be relative path: %s", name)
	case len(name) > 4096:
		return errors.New("invalid path: must be less than or equal to 4096 characters")
	}
	parts := strings.Split(name, "/")
	for _, part := range parts {
		if part == ".." {
			return fmt.Errorf("invalid path: must not contain '..': %s", name)
		}
		if len(part) > 255 {
			return errors.New("invalid path: filenames must be less than or equal to 255 characters")
		}
	}
	if strings.HasPrefix(parts[0], "..") {
		return fmt.Errorf("invalid path: must not start with '..': %s", name)
	}
	p[path.Clean(name)] = f
	return nil
}

// publish makes the payload the content of the volume, all of it at once, and
// clears what earlier calls have left. Where it fails, the content is the old one.
func publish(root *os.Root, want payload, group *int64) (err error) {
	current, err := root.Readlink(dataLink)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if !strings.HasPrefix(current, "..2") || strings.Contains(current, "/") {
		current = ""
	}
	tops := map[string]*int64{} // the names that the volume shows, with their owners
	for name, f := range want {
		top, _, _ := strings.Cut(name, "/")
		tops[top] = f.owner
	}
	if current != "" && same(root, current, want) {
		if _, err := link(root, tops, group); err != nil {
			return err
		}
		return sweep(root, current, tops)
	}

	stamp := fmt.Sprintf("%s%09d", time.Now().UTC().Format("..2006_01_02_15_04_05."), rand.IntN(1e9))
	var made []string
	defer func() {
		if err != nil {
			for _, name := range append(made, newDataLink, stamp) {
				_ = root.RemoveAll(name)
			}
		}
	}()
	if err := fill(root, stamp, want, group); err != nil {
		return err
	}
	// The links come first: whoever sees ..data change sees every file.
	if made, err = link(root, tops, group); err != nil {
		return err
	}
	if err := root.RemoveAll(newDataLink); err != nil {
		return err
	}
	if err := root.Symlink(stamp, newDataLink); err != nil {
		return err
	}
	if err := own(root, newDataLink, nil, group); err != nil {
		return err
	}
	reached("new ..data")
	if err := root.Rename(newDataLink, dataLink); err != nil {
		return err
	}
	reached("swapped")
	if err := sweep(root, stamp, tops); err != nil {
		made, stamp = nil, newDataLink // they are in use
		return err
	}
	return nil
}

// same tells whether the folder holds exactly the files of the payload.
func same(root *os.Root, dir string, want payload) bool {
	sub, err := root.OpenRoot(dir)
	if err != nil {
		return false
	}
	defer func() { _ = sub.Close() }()
	n := 0
	err = fs.WalkDir(sub.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, ok := want[name]
		if !ok || !d.Type().IsRegular() {
			return fs.ErrExist
		}
		if info, err := d.Info(); err != nil || info.Size() != int64(len(f.data)) {
			return fs.ErrExist
		}
		if data, err := sub.ReadFile(name); err != nil || !bytes.Equal(data, f.data) {
			return fs.ErrExist
		}
		n++
		return nil
	})
	return err == nil && n == len(want)
}

// fill makes the folder with the payload's files in it.
func fill(root *os.Root, stamp string, want payload, group *int64) error {
	dirs := map[string]bool{".": true}
	mkdir := func(dir string) error {
		if err := root.Mkdir(dir, 0o755); err != nil {
			return err
		}
		return errors.Join(root.Chmod(dir, ownMode(0o755|fs.ModeDir, group)), own(root, dir, nil, group)) // chmod: not with the agent's umask
	}
	if err := mkdir(stamp); err != nil {
		return err
	}
	reached("folder")
	for name, f := range want {
		var missing []string
		for dir := path.Dir(name); !dirs[dir]; dir = path.Dir(dir) {
			missing = append(missing, dir)
			dirs[dir] = true
		}
		for i := len(missing) - 1; i >= 0; i-- {
			if err := mkdir(stamp + "/" + missing[i]); err != nil {
				return err
			}
		}
		full := stamp + "/" + name
		if err := root.WriteFile(full, f.data, 0o600); err != nil {
			return err
		}
		if err := own(root, full, f.owner, group); err != nil {
			return err
		}
		if err := root.Chmod(full, ownMode(f.mode, group)); err != nil {
			return err
		}
		reached("file")
	}
	return nil
}

// link makes the names that the volume shows. A folder in the place of one is a
// mount point below the volume, and stays.
func link(root *os.Root, tops map[string]*int64, group *int64) (made []string, err error) {
	for name, owner := range tops {
		to := dataLink + "/" + name
		if info, err := root.Lstat(name); err == nil {
			if info.IsDir() {
				continue
			}
			if now, err := root.Readlink(name); err == nil && now == to {
				continue
			}
			if err := root.Remove(name); err != nil {
				return made, err
			}
		}
		if err := root.Symlink(to, name); err != nil {
			return made, err
		}
		made = append(made, name)
		if err := own(root, name, owner, group); err != nil {
			return made, err
		}
		reached("link")
	}
	return made, nil
}

// sweep removes all but the content, the names and the mount points below the volume.
func sweep(root *os.Root, stamp string, tops map[string]*int64) error {
	dir, err := root.Open(".")
	if err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	if err := errors.Join(err, dir.Close()); err != nil {
		return err
	}
	for _, name := range names {
		if name == dataLink || name == stamp {
			continue
		}
		if !strings.HasPrefix(name, "..") {
			if _, ok := tops[name]; ok {
				continue
			}
			if to, err := root.Readlink(name); err != nil || !strings.HasPrefix(to, dataLink+"/") {
				continue
			}
		}
		if err := root.RemoveAll(name); err != nil {
			return err
		}
		reached("swept")
	}
	return nil
}

// own gives a file or a link to its owner and the pod's group.
func own(root *os.Root, name string, owner, group *int64) error {
	if owner == nil && group == nil {
		return nil
	}
	uid, gid := -1, -1
	if owner != nil {
		uid = int(*owner)
	}
	if group != nil {
		gid = int(*group)
	}
	return root.Lchown(name, uid, gid)
}

// ownMode is the mode of what the pod's group may read.
func ownMode(mode fs.FileMode, group *int64) fs.FileMode {
	switch {
	case group == nil:
		return mode
	case mode.IsDir():
		return mode | 0o550 | fs.ModeSetgid
	}
	return mode | 0o440
}
