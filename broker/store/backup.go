package store

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

const (
	// backupSuffix is added to the store's folder for the copy that a backup
	// streams from. It is removed afterwards, and by the next start after a kill.
	backupSuffix = ".backup-in-progress"
	// manifestName is the last file of a backup, so that one without it is
	// known to be cut off.
	manifestName = "fairlead-backup.json"
	// backupVersion is the version of the backup's own form.
	backupVersion = 1
	// maxManifest bounds the manifest, maxBackupFiles the files that it lists.
	maxManifest    = 16 << 20
	maxBackupFiles = 100_000
)

// ErrBackupRunning is wrapped by [Store.Backup] while another one runs.
var ErrBackupRunning = errors.New("a backup is running already")

// BackupManifest is the last file of a backup.
type BackupManifest struct {
	// Version is the backup's own form.
	Version int `json:"version"`
	// Format is the version of the store's keys and values.
	Format uint64 `json:"format"`
	// Node is whose store it is; empty for the cloud broker's.
	Node string `json:"node,omitempty"`
	// Time is when it was made: everything acknowledged before is in it.
	Time time.Time `json:"time"`
	// Files are all the others, in their order.
	Files []BackupFile `json:"files"`
}

// BackupFile is one file of a backup.
type BackupFile struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"` // in hex
}

// Bytes is the size of all files.
func (m *BackupManifest) Bytes() int64 {
	var n int64
	for _, f := range m.Files {
		n += f.Size
	}
	return n
}

// Backup writes a tar of the store as it is at this moment to w, while the store
// goes on working. It holds everything that was committed before, synced or not.
// The copy that it is read from shares the tables with the store and takes disk
// space for the logs only, a few MiB, for as long as w takes; it is refused with
// [ErrDiskFull] while the store refuses writes, and with [ErrBackupRunning]
// while another one runs.
func (s *Store) Backup(w io.Writer, node string) (err error) {
	if !s.backing.TryLock() {
		return fmt.Errorf("store %s: %w", s.dir, ErrBackupRunning)
	}
	defer s.backing.Unlock()
	m := BackupManifest{Node: node, Time: time.Now().UTC()}
	dir := s.dir + backupSuffix
	if err := s.freeze(dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.fs.RemoveAll(dir)) }()
	if err := writeBackup(w, s.fs, dir, m); err != nil {
		return fmt.Errorf("store %s: backup: %w", s.dir, err)
	}
	return nil
}

// freeze makes a copy of the open store that shares its tables.
func (s *Store) freeze(dir string) error {
	s.life.RLock()
	defer s.life.RUnlock()
	if err := errors.Join(s.alive(), s.Err()); err != nil {
		return err
	}
	if err := s.fs.RemoveAll(dir); err != nil {
		return fmt.Errorf("store %s: backup: %w", s.dir, err)
	}
	err := s.guard(func() error { return s.db.Checkpoint(dir, pebble.WithFlushedWAL()) })
	if err == nil || errors.Is(err, ErrFailed) {
		return err
	}
	err = errors.Join(err, s.fs.RemoveAll(dir))
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("store %s: backup: %w: %w; make room", s.dir, ErrDiskFull, err)
	}
	return fmt.Errorf("store %s: backup: %w", s.dir, err)
}

// BackupClosed writes a backup of a store that is not open. node is as for
// [Store.Backup].
func BackupClosed(dir string, w io.Writer, node string) error {
	if err := exists(dir); err != nil {
		return err
	}
	lock, err := pebble.LockDirectory(dir, vfs.Default)
	if err != nil {
		if locked(dir, err) {
			return fmt.Errorf("store %s: %w: its agent is running", dir, ErrInUse)
		}
		return fmt.Errorf("store %s: %w", dir, err)
	}
	err = writeBackup(w, vfs.Default, dir, BackupManifest{Node: node, Time: time.Now().UTC()})
	if err := errors.Join(err, lock.Close()); err != nil {
		return fmt.Errorf("store %s: backup: %w", dir, err)
	}
	return nil
}

// storeFile tells whether a file belongs to a store's content.
func storeFile(name string) bool {
	return name == cleanFile || strings.HasSuffix(name, ".sst") || strings.HasSuffix(name, ".log") ||
		strings.HasPrefix(name, "MANIFEST-") || strings.HasPrefix(name, "OPTIONS-") || strings.HasPrefix(name, "marker.")
}

// writeBackup writes the files of a folder that nobody changes, and the manifest.
func writeBackup(w io.Writer, fs vfs.FS, dir string, m BackupManifest) error {
	m.Version, m.Format = backupVersion, format
	names, err := fs.List(dir)
	if err != nil {
		return err
	}
	names = slices.DeleteFunc(names, func(n string) bool { return !storeFile(n) })
	slices.Sort(names)
	t := tar.NewWriter(w)
	for _, name := range names {
		f, err := addFile(t, fs, filepath.Join(dir, name), m.Time)
		if err != nil {
			return err
		}
		m.Files = append(m.Files, f)
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := t.WriteHeader(header(manifestName, int64(len(b)), m.Time)); err != nil {
		return err
	}
	if _, err := t.Write(b); err != nil {
		return err
	}
	return t.Close()
}

func header(name string, size int64, at time.Time) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: at}
}

func addFile(t *tar.Writer, fs vfs.FS, path string, at time.Time) (BackupFile, error) {
	f, err := fs.Open(path)
	if err != nil {
		return BackupFile{}, err
	}
	fi, err := f.Stat()
	if err != nil {
		return BackupFile{}, errors.Join(err, f.Close())
	}
	out := BackupFile{Name: filepath.Base(path), Size: fi.Size()}
	h := sha256.New()
	if err = t.WriteHeader(header(out.Name, out.Size, at)); err == nil {
		var n int64
		if n, err = io.Copy(io.MultiWriter(t, h), io.LimitReader(f, out.Size)); err == nil && n != out.Size {
			err = fmt.Errorf("%s became shorter while it was read", path)
		}
	}
	out.SHA256 = hex.EncodeToString(h.Sum(nil))
	return out, errors.Join(err, f.Close())
}

// VerifyBackup reads a backup to its end and compares every file with the
// manifest. An error of the backup's content is errors.Is [ErrNotBackup].
func VerifyBackup(r io.Reader) (BackupManifest, error) {
	return readBackup(r, func(string, int64, io.Reader) error { return nil })
}

// ErrNotBackup is wrapped where what should be a backup is none, is cut off or damaged.
var ErrNotBackup = errors.New("not a whole backup")

// readBackup calls take for every file of a backup and verifies all of it. take
// need not read its file to the end.
func readBackup(r io.Reader, take func(name string, size int64, r io.Reader) error) (BackupManifest, error) {
	var got []BackupFile
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("it ends before its manifest: the transfer was cut off")
			}
			return BackupManifest{}, fmt.Errorf("%w: %w", ErrNotBackup, err)
		}
		if h.Typeflag != tar.TypeReg || sparse(h) || filepath.Base(h.Name) != h.Name || h.Name != manifestName && !storeFile(h.Name) {
			return BackupManifest{}, fmt.Errorf("%w: it holds %q, which belongs to no store", ErrNotBackup, h.Name)
		}
		if h.Name == manifestName {
			return verifyManifest(t, h.Size, got)
		}
		if len(got) == maxBackupFiles || slices.ContainsFunc(got, func(f BackupFile) bool { return f.Name == h.Name }) {
			return BackupManifest{}, fmt.Errorf("%w: it holds %q twice, or too many files", ErrNotBackup, h.Name)
		}
		sum := &summed{r: t, h: sha256.New()}
		if err := take(h.Name, h.Size, sum); err != nil {
			return BackupManifest{}, err
		}
		if _, err := io.Copy(io.Discard, sum); err != nil {
			return BackupManifest{}, fmt.Errorf("%s: %w", h.Name, err)
		}
		got = append(got, BackupFile{Name: h.Name, Size: h.Size, SHA256: hex.EncodeToString(sum.h.Sum(nil))})
	}
}

// sparse tells whether a file of a few bytes in the tar would be read as one of
// any size.
func sparse(h *tar.Header) bool {
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

type summed struct {
	r io.Reader
	h hash.Hash
}

func (s *summed) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	_, _ = s.h.Write(b[:n])          // a hash takes everything
	if err != nil && err != io.EOF { //nolint:errorlint // io.Reader returns io.EOF bare
		err = fmt.Errorf("%w: %w", ErrNotBackup, err)
	}
	return n, err
}

func verifyManifest(r io.Reader, size int64, got []BackupFile) (BackupManifest, error) {
	var m BackupManifest
	if size > maxManifest {
		return m, fmt.Errorf("%w: a manifest of %d bytes", ErrNotBackup, size)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return m, fmt.Errorf("%w: manifest: %w", ErrNotBackup, err)
	}
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&m); err != nil {
		return m, fmt.Errorf("%w: manifest: %w", ErrNotBackup, err)
	}
	if m.Version > backupVersion || m.Format > format {
		return m, fmt.Errorf("%w: backup of version %d with format %d, this program knows up to %d and %d; use the newer version", ErrNewer, m.Version, m.Format, backupVersion, format)
	}
	if m.Version < 1 {
		return m, fmt.Errorf("%w: the manifest has no version", ErrNotBackup)
	}
	for i, f := range m.Files {
		if i >= len(got) || got[i] != f {
			return m, fmt.Errorf("%w: %s is missing or not what the manifest says: the backup is damaged", ErrNotBackup, f.Name)
		}
	}
	if len(got) != len(m.Files) {
		return m, fmt.Errorf("%w: it holds files that the manifest does not list", ErrNotBackup)
	}
	return m, nil
}

// Restore makes a store of a backup in dir, which must not be there yet or be
// empty. Everything is written beside dir first, verified against the manifest,
// synced and checked as [Check] does; only then it gets its name. An error
// leaves nothing behind. The disk's reserve is kept free.
func Restore(r io.Reader, dir string) (m BackupManifest, err error) {
	if names, err := os.ReadDir(dir); err == nil && len(names) > 0 {
		return m, fmt.Errorf("restore: %s is not empty: move it away or name another folder", dir)
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return m, fmt.Errorf("restore: %w", err)
	}
	parent := filepath.Dir(filepath.Clean(dir))
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return m, fmt.Errorf("restore: %w", err)
	}
	tmp, err := os.MkdirTemp(parent, filepath.Base(dir)+".restoring-*") // mode 0700
	if err != nil {
		return m, fmt.Errorf("restore: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("restore: %w", err), os.RemoveAll(tmp))
		}
	}()
	m, err = readBackup(r, func(name string, size int64, r io.Reader) error {
		if err := room(tmp, size); err != nil {
			return err
		}
		return writeSynced(filepath.Join(tmp, name), r)
	})
	if err != nil {
		if errors.Is(err, syscall.ENOSPC) {
			err = fmt.Errorf("%w: %w", ErrDiskFull, err)
		}
		return m, err
	}
	if err := syncFolder(tmp); err != nil {
		return m, err
	}
	rep, err := Check(tmp, nil)
	if err != nil {
		return m, err
	}
	if len(rep.Damage) > 0 {
		return m, fmt.Errorf("%w: its files are whole but the store in it is damaged: %s: %s; unpack it with tar and use `fairlead store repair`",
			errCorrupt, rep.Damage[0].Where, rep.Damage[0].Problem)
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return m, err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return m, err
	}
	return m, syncFolder(parent)
}

// room answers a disk that has no room for so many bytes above the reserve.
func room(dir string, size int64) error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return err
	}
	free := int64(st.Bavail) * int64(st.Bsize) //nolint:unconvert // Bsize is an int32 on 32-bit ARM
	if free-size < DefaultReserve {
		return fmt.Errorf("%w: %d MiB are free on the disk of %s, %d MiB more than the reserve are wanted; make room", ErrDiskFull, free>>20, dir, (size+DefaultReserve)>>20)
	}
	return nil
}

func writeSynced(path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
