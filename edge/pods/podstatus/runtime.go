package podstatus

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Labels and annotations of a runtime container, as the kubelet writes them.
const (
	labelName               = "io.kubernetes.container.name"
	annotationHash          = "io.kubernetes.container.hash"
	annotationRestarts      = "io.kubernetes.container.restartCount"
	annotationMessagePath   = "io.kubernetes.container.terminationMessagePath"
	annotationMessagePolicy = "io.kubernetes.container.terminationMessagePolicy"
)

// The bounds of a termination message: of the file, of the log's end that stands
// in for it, and of all the messages of a pod together.
const (
	maxMessage    = 4 << 10
	MaxLogMessage = 2 << 10
	MaxLogLines   = 80
	maxPodMessage = 12 << 10
)

// Container is one runtime container of a pod, running or dead.
type Container struct {
	Name      string // the container's name in the pod's spec
	ID        string // the runtime's id, without a scheme
	SandboxID string
	State     runtimeapi.ContainerState
	Created   time.Time
	Started   time.Time // zero before it was started
	Finished  time.Time
	ExitCode  int32
	Reason    string
	Message   string // the runtime's, and the termination message
	Image     string
	ImageRef  string
	Hash      string // of the spec that it was made from
	Restarts  int32
	Resources *runtimeapi.LinuxContainerResources
	User      *runtimeapi.LinuxContainerUser
}

// FromRuntime reads a container's status into what this package works with. For an
// exited container it reads the termination message: the file that is mounted at
// the annotated path, and with FallbackToLogsOnError the end of the log through
// tail (at most MaxLogMessage bytes, MaxLogLines lines of the file at the path).
// An exited container does not change, so the result can be kept.
func FromRuntime(s *runtimeapi.ContainerStatus, sandboxID string, tail func(logPath string) (string, error)) Container {
	c := Container{
		Name: s.Labels[labelName], ID: s.Id, SandboxID: sandboxID, State: s.State,
		Created: time.Unix(0, s.CreatedAt), Image: s.GetImage().GetImage(), ImageRef: s.ImageRef,
		Hash: s.Annotations[annotationHash], Resources: s.GetResources().GetLinux(), User: s.GetUser().GetLinux(),
	}
	if c.Name == "" {
		c.Name = s.GetMetadata().GetName()
	}
	if n, err := strconv.ParseInt(s.Annotations[annotationRestarts], 10, 32); err == nil {
		c.Restarts = int32(n)
	} else {
		c.Restarts = int32(s.GetMetadata().GetAttempt())
	}
	if s.State != runtimeapi.ContainerState_CONTAINER_CREATED {
		c.Started = time.Unix(0, s.StartedAt)
	}
	if s.State != runtimeapi.ContainerState_CONTAINER_EXITED {
		return c
	}
	c.Finished, c.ExitCode, c.Reason, c.Message = time.Unix(0, s.FinishedAt), s.ExitCode, s.Reason, s.Message
	if m := terminationMessage(s, tail); m != "" {
		if c.Message != "" {
			c.Message += ": "
		}
		c.Message += m
	}
	return c
}

func terminationMessage(s *runtimeapi.ContainerStatus, tail func(string) (string, error)) string {
	message, ok := messageFile(s)
	fallback := s.Annotations[annotationMessagePolicy] == string(corev1.TerminationMessageFallbackToLogsOnError) &&
		s.ExitCode != 0 && s.Reason != "ContainerCannotRun"
	if message != "" || !ok || !fallback || tail == nil {
		return message
	}
	end, err := tail(s.GetLogPath())
	if err != nil {
		return fmt.Sprintf("Error on reading termination message from logs: %v", err)
	}
	if len(end) > MaxLogMessage {
		end = end[len(end)-MaxLogMessage:]
	}
	return end
}

// messageFile gives the end of the termination message file. ok is false when
// there is a file that could not be read: then the message says so.
func messageFile(s *runtimeapi.ContainerStatus) (message string, ok bool) {
	at := s.Annotations[annotationMessagePath]
	if at == "" {
		return "", true
	}
	if !path.IsAbs(at) {
		at = "/" + at
	}
	for _, m := range s.Mounts {
		if m.ContainerPath != at {
			continue
		}
		b, err := readEnd(m.HostPath, maxMessage)
		if errors.Is(err, fs.ErrNotExist) {
			return "", true
		}
		if err != nil {
			return fmt.Sprintf("Error on reading termination log %s: %v", m.HostPath, err), false
		}
		return string(b), true
	}
	return "", true
}

func readEnd(name string, limit int64) ([]byte, error) {
	// A container may have put something else there, such as a FIFO, which nobody
	// would ever write to.
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() && !st.IsDir() { // reading a folder says itself that it is one
		return nil, &fs.PathError{Op: "read", Path: name, Err: errors.New("not a regular file")}
	}
	if n := st.Size(); n > limit {
		if _, err := f.Seek(n-limit, io.SeekStart); err != nil {
			return nil, err
		}
	}
	return io.ReadAll(io.LimitReader(f, limit))
}
