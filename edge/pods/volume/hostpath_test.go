package volume

import (
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

func TestHostPath(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/file", "x")
	l := must[net.Listener](t)(net.Listen("unix", dir+"/sock"))
	defer func() { _ = l.Close() }()
	if err := os.Symlink(dir+"/file", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	block := dir + "/file" // where no device can be made
	if os.Geteuid() == 0 {
		block = dir + "/block"
		if err := unix.Mknod(block, unix.S_IFBLK|0o600, int(unix.Mkdev(7, 77))); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		path string
		kind corev1.HostPathType
		want string // DIR stands for the folder
	}{
		{"DIR/none", "", ""},
		{"DIR", "Directory", ""},
		{"DIR/file", "File", ""},
		{"DIR/link", "File", ""},
		{"DIR/sock", "Socket", ""},
		{"/dev/null", "CharDevice", ""},
		{block, "BlockDevice", ""},
		{"DIR/made/below", "DirectoryOrCreate", ""},
		{"DIR/made/below", "Directory", ""},
		{"DIR/made/file", "FileOrCreate", ""},
		{"DIR/made/file", "File", ""},
		{"DIR/missing/file", "FileOrCreate", "open DIR/missing/file: no such file or directory"},
		{"DIR/file", "Directory", "hostPath type check failed: DIR/file is not a directory, it's a File"},
		{"DIR/file", "DirectoryOrCreate", "hostPath type check failed: DIR/file is not a directory, it's a File"},
		{"DIR", "File", "hostPath type check failed: DIR is not a file, it's a Directory"},
		{"DIR", "FileOrCreate", "hostPath type check failed: DIR is not a file, it's a Directory"},
		{"DIR/file", "Socket", "hostPath type check failed: DIR/file is not a socket file, it's a File"},
		{"DIR/sock", "CharDevice", "hostPath type check failed: DIR/sock is not a character device, it's a Socket"},
		{"/dev/null", "BlockDevice", "hostPath type check failed: /dev/null is not a block device, it's a CharDevice"},
		{"DIR/none", "Directory", `hostPath type check failed, DIR/none is not a directory, unable to determine its type: path "DIR/none" does not exist`},
		{"DIR/none", "CharDevice", `hostPath type check failed, DIR/none is not a character device, unable to determine its type: path "DIR/none" does not exist`},
		{"DIR/fifo", "File", "hostPath type check failed, DIR/fifo is not a file, unable to determine its type: only recognise file, directory, socket, block device and character device"},
		{"DIR/../x", "", "invalid HostPath `DIR/../x`: must not contain '..'"},
		{"DIR", "Cupboard", "Cupboard is an invalid volume type"},
	} {
		if c.kind == "BlockDevice" && block == dir+"/file" {
			continue
		}
		err := checkHostPath(&corev1.HostPathVolumeSource{Path: strings.ReplaceAll(c.path, "DIR", dir), Type: &c.kind})
		got := ""
		if err != nil {
			got = strings.ReplaceAll(err.Error(), dir, "DIR")
		}
		if got != c.want {
			t.Errorf("%s %s:\ngot  %s\nwant %s", c.path, c.kind, got, c.want)
		}
	}
	for path, want := range map[string]os.FileMode{"made": 0o755 | os.ModeDir, "made/below": 0o755 | os.ModeDir, "made/file": 0o644} {
		if got := must[os.FileInfo](t)(os.Stat(dir + "/" + path)).Mode(); got != want {
			t.Errorf("%s: %v, want %v", path, got, want)
		}
	}
}
