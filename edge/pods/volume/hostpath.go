package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// checkHostPath makes sure that the path is of the type that the pod wants. With
// no type wanted, nothing is looked at: the runtime makes a folder of what is missing.
func checkHostPath(hp *corev1.HostPathVolumeSource) error {
	if backsteps(hp.Path) {
		return fmt.Errorf("invalid HostPath `%s`: %w", hp.Path, errBacksteps)
	}
	if hp.Type == nil || *hp.Type == corev1.HostPathUnset {
		return nil
	}
	switch t := *hp.Type; t {
	case corev1.HostPathDirectoryOrCreate:
		if _, err := os.Stat(hp.Path); err != nil {
			return os.MkdirAll(hp.Path, 0o755)
		}
		return checkType(hp.Path, corev1.HostPathDirectory, "directory")
	case corev1.HostPathFileOrCreate:
		if _, err := os.Stat(hp.Path); err != nil {
			f, err := os.OpenFile(hp.Path, os.O_CREATE|os.O_RDONLY, 0o644)
			if err != nil {
				return err
			}
			return f.Close()
		}
		return checkType(hp.Path, corev1.HostPathFile, "file")
	case corev1.HostPathDirectory:
		return checkType(hp.Path, t, "directory")
	case corev1.HostPathFile:
		return checkType(hp.Path, t, "file")
	case corev1.HostPathSocket:
		return checkType(hp.Path, t, "socket file")
	case corev1.HostPathCharDev:
		return checkType(hp.Path, t, "character device")
	case corev1.HostPathBlockDev:
		return checkType(hp.Path, t, "block device")
	default:
		return fmt.Errorf("%s is an invalid volume type", t)
	}
}

func checkType(path string, want corev1.HostPathType, expected string) error {
	is, err := hostPathType(path)
	switch {
	case err != nil:
		return fmt.Errorf("hostPath type check failed, %s is not a %s, unable to determine its type: %w", path, expected, err)
	case is != want:
		return fmt.Errorf("hostPath type check failed: %s is not a %s, it's a %s", path, expected, is)
	}
	return nil
}

func hostPathType(path string) (corev1.HostPathType, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("path %q does not exist", path)
	}
	if err != nil {
		return "", err
	}
	switch m := info.Mode(); {
	case m.IsDir():
		return corev1.HostPathDirectory, nil
	case m.IsRegular():
		return corev1.HostPathFile, nil
	case m&fs.ModeSocket != 0:
		return corev1.HostPathSocket, nil
	case m&fs.ModeCharDevice != 0:
		return corev1.HostPathCharDev, nil
	case m&fs.ModeDevice != 0:
		return corev1.HostPathBlockDev, nil
	}
	return "", errors.New("only recognise file, directory, socket, block device and character device")
}

var errBacksteps = errors.New("must not contain '..'")

func backsteps(path string) bool { return slices.Contains(strings.Split(path, "/"), "..") }
