package logs

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"k8s.io/apimachinery/pkg/types"
)

// maxFileName is what ext4 allows.
const maxFileName = 255

// PodDir gives the folder below the log root that holds a pod's logs.
func PodDir(root, namespace, name string, uid types.UID) string {
	return filepath.Join(root, namespace+"_"+name+"_"+string(uid))
}

// PodUID gives the UID in the name of a pod's log folder; false for names of
// another kind.
func PodUID(dir string) (types.UID, bool) {
	parts := strings.Split(filepath.Base(dir), "_")
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
		return "", false
	}
	return types.UID(parts[2]), true
}

// LinkPath gives the symbolic link, in a folder such as /var/log/containers, by
// which log collectors know a container's log.
func LinkPath(dir, namespace, pod, container, containerID string) string {
	const ext = ".log"
	name := fmt.Sprintf("%s_%s_%s-%s", pod, namespace, container, containerID)
	return filepath.Join(dir, name[:min(len(name), maxFileName-len(ext))]+ext)
}

// Link makes the link of a container's log, over one that may be there.
func Link(link, log string) error {
	if at, err := os.Readlink(link); err == nil && at == log {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		return err
	}
	if err := remove(link); err != nil {
		return err
	}
	return os.Symlink(log, link)
}
