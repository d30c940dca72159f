package volume

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// Hosts writes the file that the pod's containers have as /etc/hosts, and returns
// its path: "" while a pod in a network of its own has no address. The hostname is
// the pod's; the domain, that of its subdomain in the cluster, may be empty. What a
// container wrote into the file is gone.
func (v *Volumes) Hosts(pod *corev1.Pod, podIPs []string, hostname, domain string) (string, error) {
	dir, err := v.podDir(pod.UID)
	if err != nil {
		return "", err
	}
	var b bytes.Buffer
	switch {
	case pod.Spec.HostNetwork:
		b.WriteString("# Kubernetes-managed hosts file (host network).\n")
		host, err := os.ReadFile(v.cfg.HostsFile)
		if err != nil {
			return "", err
		}
		b.Write(host)
	case len(podIPs) == 0:
		return "", nil
	default:
		b.WriteString("# Kubernetes-managed hosts file.\n" +
			"127.0.0.1\tlocalhost\n" +
			"::1\tlocalhost ip6-localhost ip6-loopback\n" +
			"fe00::0\tip6-localnet\n" +
			"fe00::0\tip6-mcastprefix\n" +
			"fe00::1\tip6-allnodes\n" +
			"fe00::2\tip6-allrouters\n")
		for _, ip := range podIPs {
			b.WriteString(ip + "\t")
			if domain != "" {
				b.WriteString(hostname + "." + domain + "\t")
			}
			b.WriteString(hostname + "\n")
		}
	}
	if aliases := pod.Spec.HostAliases; len(aliases) > 0 {
		b.WriteString("\n# Entries added by HostAliases.\n")
		for _, a := range aliases {
			b.WriteString(a.IP + "\t" + strings.Join(a.Hostnames, "\t") + "\n")
		}
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return "", fmt.Errorf("write the hosts file of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	file := filepath.Join(dir, "etc-hosts")
	if err := rewrite(file, b.Bytes()); err != nil {
		return "", fmt.Errorf("write the hosts file of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return file, nil
}

// rewrite changes what is in a file that containers have mounted: it stays the same
// file. Space is had first, so that a full disk leaves it as it is.
func rewrite(name string, want []byte) error {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() == int64(len(want)) && info.Mode().Perm() == 0o644 {
		is, err := io.ReadAll(f)
		if err == nil && bytes.Equal(is, want) {
			return nil
		}
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, int64(len(want)))
	if err == nil || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		if _, err = f.WriteAt(want, 0); err == nil {
			err = errors.Join(f.Truncate(int64(len(want))), f.Chmod(0o644))
		}
	} else {
		err = &fs.PathError{Op: "write", Path: name, Err: err}
	}
	if err != nil && info.Size() == 0 {
		_ = os.Remove(name)
	}
	reached("hosts")
	return err
}
