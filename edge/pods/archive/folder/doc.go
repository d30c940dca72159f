// Package folder watches the folder into which image archives are dropped, for
// the agent. The import itself is a process of its own, the command
// fairlead-images, so that the agent never holds what an import takes.
//
//	program, err := folder.Program()
//	folder.Watch(ctx, folder.Config{
//		Dir: dir, Command: append([]string{program}, folder.Arguments(dir, socket)...),
//		Done: func(r folder.Result) { … log it, make an event … }, Logger: log,
//	})
package folder
