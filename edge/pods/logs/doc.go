// Package logs rotates the log files of containers as the kubelet does. A
// container writes <restart>.log through its runtime; once it is as large as
// MaxSize it becomes <restart>.log.<time>, the runtime opens a new one, and the
// rotated ones but the newest are compressed to <restart>.log.<time>.gz. MaxFiles
// of a container are kept, all told.
//
//	r, err := logs.New(logs.Config{Live: live, Reopen: cri.ReopenContainerLog, Logger: log, Metrics: reg})
//	go r.Run(ctx)
//
// An idle look is one stat for each running container.
package logs
