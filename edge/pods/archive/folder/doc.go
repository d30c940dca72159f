// Package folder watches the folder into which image archives are dropped, for
// the agent. The import itself is a process of its own (`fairlead-edge images
// import --folder`), so that the agent never holds what an import takes.
//
//	folder.Watch(ctx, folder.Config{
//		Dir: "/var/lib/fairlead/images", Command: folder.Command(dir, socket),
//		Done: func(r folder.Result) { … log it, make an event … }, Logger: log,
//	})
package folder
